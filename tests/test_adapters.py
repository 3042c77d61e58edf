"""Adapters from elsewhere give PEFT's logits in the graph, or are refused in one line naming the tensor."""

import dataclasses
import json
import re
import shutil
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import onnx_ir as ir
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lab.models.adapt import adapt
from stages.adapters.convert import convert
from stages.adapters.lora_inputs import BASE, load_graph
from stages.adapters.names import LORA_GRAPH
from stages.adapters.peft_adapter import INITIALISATIONS, UNDERSTOOD
from stages.answers.generation import OnnxModel
from stages.core.errors import UserError
from support.tiny_models import FAMILIES, checkpoint, exported, logits, same, tokens, trained

PROMPT = tokens(12)
REGEX = r".*\.1\.(self_attn\.(q|v)_proj|mlp\.down_proj)"
# options with which PEFT uses the same tensors in another way, keeps others, or changes the base
REFUSED = {
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
}
CHANGE_THE_BASE = {"corda", "loftq", "olora", "pissa", "pissa_niter_[number of iters]"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    root = tmp_path_factory.mktemp("llama")
    packed = checkpoint(root, FAMILIES["llama"])
    return packed, exported(packed, root / "onnx")


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    root = tmp_path_factory.mktemp("phi3")
    packed = checkpoint(root, FAMILIES["phi3"])
    return packed, exported(packed, root / "onnx")


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "r": 16, "lora_alpha": 16},
        {"rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 1}},
        {"target_modules": REGEX},
        {"target_modules": ["k_proj", "o_proj"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "gate_proj"]},
    ],
    ids=["rslora", "patterns", "regex", "two-modules", "upper-layers"],
)
def test_an_adapter_gives_pefts_logits(options, llama, tmp_path):
    packed, onnx = llama
    expected = logits(trained(packed, tmp_path / "peft", 3, **options), PROMPT)
    convert(tmp_path / "peft", onnx, tmp_path / "file")
    found = OnnxModel(onnx, {"one": tmp_path / "file"}).logits(PROMPT, "one")
    same(found, expected)
    assert np.abs(found - OnnxModel(onnx).logits(PROMPT)).max() > 0.01


def test_a_fused_projection_of_the_base_takes_its_adapter(phi3, tmp_path):
    packed, onnx = phi3
    targets = ["qkv_proj", "gate_up_proj"]
    expected = logits(trained(packed, tmp_path / "peft", 3, target_modules=targets), PROMPT)
    convert(tmp_path / "peft", onnx, tmp_path / "file")
    same(OnnxModel(onnx, {"one": tmp_path / "file"}).logits(PROMPT, "one"), expected)


def test_split_projections_on_a_fused_base_are_refused_as_in_peft(llama, phi3, tmp_path):
    trained(llama[0], tmp_path / "peft", 3, target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"has no q_proj: it has .*qkv_proj"):
        convert(tmp_path / "peft", phi3[1], tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora is set|DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"whole matrices \(modules_to_save\).*lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on the embedding.*lora_embedding_A"),
        ({"bias": "lora_only"}, None),
    ],
    ids=["dora", "modules-to-save", "embedding", "bias"],
)
def test_what_is_more_than_lora_is_refused_by_name(options, reason, llama, tmp_path):
    trained(llama[0], tmp_path / "peft", 3, **options)
    if reason is None:  # this base has no bias to save: as an adapter of another would
        add(
            tmp_path / "peft",
            {"base_model.model.model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
        )
        reason = "biases.*q_proj.bias"
    with pytest.raises(UserError, match=reason) as refusal:
        convert(tmp_path / "peft", llama[1], tmp_path / "file")
    assert len(str(refusal.value).splitlines()) == 1
    assert not (tmp_path / "file").exists()


def add(folder, tensors: dict) -> None:
    """Put tensors into a saved adapter."""
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})


def test_an_adapter_of_another_base_is_noticed(llama, tmp_path):
    other = checkpoint(tmp_path / "other", FAMILIES["llama"] | {"intermediate_size": 96})
    trained(other, tmp_path / "peft", 3)
    with pytest.raises(UserError, match="belongs to another model"):
        convert(tmp_path / "peft", llama[1], tmp_path / "file")


@pytest.mark.parametrize("way", ["pissa", "olora"])
def test_an_adapter_that_began_by_changing_the_base_is_refused(way, llama, tmp_path):
    """In PEFT such an adapter stands on weights that loading it changes; the graph has the base's own."""
    trained(llama[0], tmp_path / "peft", 3, target_modules=["q_proj"], init_lora_weights=way)
    with pytest.raises(UserError, match=f"init_lora_weights is '{way}'"):
        convert(tmp_path / "peft", llama[1], tmp_path / "file")


@pytest.mark.parametrize("way", ["Gaussian", "mica", "orthogonal"])
def test_an_adapter_that_began_otherwise_and_left_the_base_alone_is_taken(way, llama, tmp_path):
    packed, onnx = llama
    model = trained(packed, tmp_path / "peft", 3, target_modules=["q_proj"], init_lora_weights=way)
    for name, weight in model.named_parameters():
        if ".lora_" in name:  # one of the two may be zero at first
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", onnx, tmp_path / "file")
    found = OnnxModel(onnx, {"one": tmp_path / "file"}).logits(PROMPT, "one")
    same(found, logits(model, PROMPT))


def test_every_option_that_peft_has_is_judged():
    """A new one fails here: into UNDERSTOOD of stages/adapt.py, or into REFUSED, after reading PEFT."""
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= UNDERSTOOD | REFUSED
    assert not UNDERSTOOD & REFUSED


def test_every_way_to_begin_that_peft_has_is_judged():
    """A new one fails here: into INITIALISATIONS where PEFT leaves the base's weights as they are."""
    hint = get_type_hints(LoraConfig)["init_lora_weights"]
    (names,) = [get_args(part) for part in get_args(hint) if get_origin(part) is Literal]
    assert set(names) <= {*INITIALISATIONS} | CHANGE_THE_BASE


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_an_option_that_is_not_understood_is_refused_by_name_where_it_is_set(key, llama, tmp_path):
    peft = tmp_path / "peft"
    trained(llama[0], peft, 3, target_modules=["q_proj"])
    file = peft / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {key: {"any": "thing"}}))
    with pytest.raises(UserError, match=f"{re.escape(str(file))}: {key} is set, and only plain"):
        convert(peft, llama[1], tmp_path / "file")


def test_a_configuration_with_another_rank_than_the_weights_is_refused(llama, tmp_path):
    trained(llama[0], tmp_path / "peft", 3, target_modules=["q_proj"])
    file = tmp_path / "peft/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 2}))
    with pytest.raises(UserError, match=r"q_proj is 4 in lora_A and 4 in lora_B, but 2 in"):
        convert(tmp_path / "peft", llama[1], tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", "{", "is not JSON"),
        ("adapter_config.json", "[]", "peft_type is None"),
        ("adapter_model.safetensors", "cut off", "is damaged"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(name, content, message, llama, tmp_path):
    trained(llama[0], tmp_path / "peft", 3, target_modules=["q_proj"])
    (tmp_path / "peft" / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}:? {message}") as refusal:
        convert(tmp_path / "peft", llama[1], tmp_path / "file")
    assert len(str(refusal.value).splitlines()) == 1


def test_a_file_made_for_another_model_is_refused_when_it_is_loaded(llama, tmp_path):
    other = checkpoint(tmp_path / "other", FAMILIES["llama"] | {"hidden_size": 128})
    trained(other, tmp_path / "peft", 3)
    convert(tmp_path / "peft", exported(other, tmp_path / "onnx"), tmp_path / "file")
    with pytest.raises(UserError, match="is not made for this model") as refusal:
        OnnxModel(llama[1], {"theirs": tmp_path / "file"})
    assert len(str(refusal.value).splitlines()) == 1


def test_a_module_without_inputs_in_the_graph_is_named(llama, tmp_path):
    onnx = exported(llama[0], tmp_path / "onnx", targets=["q_proj"])
    trained(llama[0], tmp_path / "peft", 3, target_modules=["q_proj", "down_proj"])
    with pytest.raises(UserError, match=r"down_proj, which has no LoRA input .*target_modules"):
        convert(tmp_path / "peft", onnx, tmp_path / "file")


def test_an_adapter_of_nan_is_refused(llama, tmp_path):
    trained(llama[0], tmp_path / "peft", 3, target_modules=["q_proj"])
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    add(tmp_path / "peft", {name: torch.full((4, 64), float("nan"))})
    with pytest.raises(UserError, match=r"q_proj\.lora_A\.weight holds NaN"):
        convert(tmp_path / "peft", llama[1], tmp_path / "file")


def test_a_key_of_a_newer_peft_is_taken_where_it_says_nothing_and_refused_where_it_does(
    llama, tmp_path
):
    trained(llama[0], tmp_path / "peft", 3, target_modules=["q_proj"])
    file = tmp_path / "peft/adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "from_the_future": None}))
    convert(tmp_path / "peft", llama[1], tmp_path / "file")
    file.write_text(json.dumps({**config, "from_the_future": True}))
    with pytest.raises(UserError, match="from_the_future is set"):
        convert(tmp_path / "peft", llama[1], tmp_path / "file")


def test_a_folder_is_never_replaced_by_an_adapter(llama, tmp_path):
    trained(llama[0], tmp_path / "peft", 3, target_modules=["q_proj"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/work.txt").write_text("dear to somebody")
    with pytest.raises(UserError, match="is a folder: name a file"):
        adapt(tmp_path / "peft", tmp_path / "mine", llama[1])
    assert (tmp_path / "mine/work.txt").exists()


def test_an_adapter_of_a_base_with_the_same_shapes_is_taken_with_a_warning_that_names_both(
    llama, tmp_path, capsys
):
    onnx = shutil.copytree(llama[1], tmp_path / "onnx")
    graph = load_graph(onnx)
    graph.metadata_props[BASE] = "SmolLM2-135M"
    ir.save(graph, onnx / LORA_GRAPH)
    trained(llama[0], tmp_path / "peft", 3, target_modules=["q_proj"])
    file = tmp_path / "peft/adapter_config.json"
    config = json.loads(file.read_text())
    for trained_on, warned in (("hub/SmolLM2-135M-Instruct", True), ("hub/SmolLM2-135M", False)):
        file.write_text(json.dumps(config | {"base_model_name_or_path": trained_on}))
        adapt(tmp_path / "peft", None, onnx)
        said = f"trained on {trained_on}, and {onnx} is SmolLM2-135M:"
        assert (said in capsys.readouterr().err) == warned
