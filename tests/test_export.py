"""The exported graphs equal PyTorch: without an adapter, with two loaded at once, in every family."""

import json
import re
import shutil

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession
from safetensors.torch import load_file, save_file

from stages.adapters.convert import convert
from stages.answers.generation import OnnxModel
from stages.core.errors import UserError
from stages.core.settings import Optimize
from stages.weights.checkpoint import load_dequantized
from support.tiny_models import (
    FAMILIES,
    checkpoint,
    exported,
    greedy,
    logits,
    same,
    tokens,
    trained,
)

SHORT = tokens(12)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Export a family at most once in this module; return its packed checkpoint and its ONNX folder."""
    made = {}

    def build(family: str):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            packed = checkpoint(root, FAMILIES[family])
            made[family] = packed, exported(packed, root / "onnx")
        return made[family]

    return build


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_every_family_answers_as_pytorch_does_with_and_without_adapters(family, built, tmp_path):
    packed, onnx_folder = built(family)
    plain = logits(load_dequantized(packed), SHORT)
    same(OnnxModel(onnx_folder).logits(SHORT), plain)
    one = logits(trained(packed, tmp_path / "one", 1), SHORT)
    two = logits(trained(packed, tmp_path / "two", 2, r=3), SHORT)
    files = {name: tmp_path / f"{name}.onnx_adapter" for name in ("one", "two")}
    for name, file in files.items():
        convert(tmp_path / name, onnx_folder, file)
    model = OnnxModel(onnx_folder, files)
    same(model.logits(SHORT, "one"), one)
    same(model.logits(SHORT, "two"), two)
    same(model.logits(SHORT), plain)
    assert np.abs(one - two).max() > 0.1 * np.abs(one).max()


def test_all_graphs_read_one_data_file(built):
    _, folder = built("tied")
    assert sorted(file.name for file in folder.glob("*.onnx*")) == [
        "lora.onnx",
        "lora_op.onnx",
        "model.onnx",
        "model.onnx.data",
    ]
    assert (folder / "lora.onnx").stat().st_size < 100_000
    graph = onnx.load(folder / "lora.onnx", load_external_data=False).graph
    named = {e.value for t in graph.initializer for e in t.external_data if e.key == "location"}
    assert named == {"model.onnx.data"}


def test_a_graph_names_the_builders_version_and_no_commit(built):
    """The builder adds the commit of the repository around its own package: .venv lies in ours."""
    _, folder = built("tied")
    for name in ("model.onnx", "lora.onnx"):
        graph = onnx.load(folder / name, load_external_data=False)
        assert re.fullmatch(r"[\d.]+", graph.producer_version), graph.producer_version


def test_a_tied_embedding_is_stored_once(built):
    def places(family):
        _, folder = built(family)
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        return {
            tensor.name: [entry.value for entry in tensor.external_data if entry.key == "offset"]
            for tensor in graph.initializer
        }

    embedding, head = "model.embed_tokens.qweight", "lm_head.MatMulNBits.qweight"
    assert places("tied")[embedding] == places("tied")[head]
    assert places("llama")[embedding] != places("llama")[head]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_stays_float_stays_float_in_the_graph(tied, tmp_path):
    packed = checkpoint(tmp_path, FAMILIES["tied" if tied else "llama"], head_bits=16)
    model = OnnxModel(exported(packed, tmp_path / "onnx"))
    same(model.logits(SHORT), logits(load_dequantized(packed), SHORT))


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("family", ["tied", "phi3"])
def test_a_symmetric_checkpoint_needs_no_zero_points(family, provider, tmp_path):
    packed = checkpoint(tmp_path, FAMILIES[family], symmetric=True)
    assert not any("qzeros" in name for name in load_file(packed / "model.safetensors"))
    level = 1 if provider == "cpu" else None
    options = Optimize(execution_provider=provider, accuracy_level=level)
    folder = exported(packed, tmp_path / "onnx", options=options)
    assert "qzeros" not in (folder / "model.onnx").read_bytes().decode("latin-1")
    if provider == "cpu":
        same(OnnxModel(folder).logits(SHORT), logits(load_dequantized(packed), SHORT))


def test_a_checkpoint_without_its_head_is_refused_by_name(tmp_path):
    packed = checkpoint(tmp_path, FAMILIES["llama"], head_bits=16)
    tensors = load_file(packed / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight is missing"):
        exported(packed, tmp_path / "onnx")
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        load_dequantized(packed)


@pytest.mark.parametrize(
    "family", ["tied", "phi3", "qwen3", "gemma3", "granite", "olmo2", "smollm3"]
)
@pytest.mark.slow
def test_a_graph_for_cuda_takes_its_adapter_in_float16(family, built, tmp_path):
    packed, _ = built(family)
    options = Optimize(execution_provider="cuda", accuracy_level=None)
    folder = exported(packed, tmp_path / "onnx", options=options)
    graph = onnx.load(folder / "lora.onnx", load_external_data=False).graph
    assert not [node for node in graph.node if node.op_type == "Gemm"]
    inputs = [v for v in graph.input if ".lora_" in v.name]
    assert {v.type.tensor_type.elem_type for v in inputs} == {onnx.TensorProto.FLOAT16}
    config = json.loads((folder / "genai_config.json").read_text())
    assert "cuda" in str(config["model"]["decoder"]["session_options"]["provider_options"])
    trained(packed, tmp_path / "one", 1)
    assert convert(tmp_path / "one", folder, tmp_path / "one.onnx_adapter") == len(inputs)


def test_sites_are_only_where_adapters_may_be(built, tmp_path):
    packed, _ = built("llama")
    folder = exported(packed, tmp_path / "onnx", targets=["v_proj", "down_proj"])
    session = InferenceSession(folder / "lora.onnx", providers=["CPUExecutionProvider"])
    sites = {
        v.name.split(".lora_")[0].split(".", 3)[3] for v in session.get_overridable_initializers()
    }
    assert sites == {"self_attn.qkv_proj", "mlp.down_proj"}


def test_targets_that_the_model_does_not_have_are_refused(built, tmp_path):
    packed, _ = built("llama")
    with pytest.raises(UserError, match=r"finetune.target_modules is \['fc1'\].* must be some of"):
        exported(packed, tmp_path / "onnx", targets=["fc1"])


@pytest.mark.parametrize("count", [40, 63, 64, 65, 120])
@pytest.mark.parametrize(
    "family",
    ["mistral", "ministral", "gemma3", "olmo3", "smollm3", "phi3-longrope", "phi3-partial"],
)
@pytest.mark.slow
def test_long_prompts_are_read_as_in_pytorch(family, count, built):
    """Windows are 48 tokens, in some layers or all; rotations of phi3 change beyond 64."""
    packed, folder = built(family)
    prompt = tokens(count)
    same(OnnxModel(folder).logits(prompt), logits(load_dequantized(packed), prompt))


@pytest.mark.parametrize("family", ["mistral", "ministral", "gemma3", "olmo3"])
@pytest.mark.slow
def test_an_answer_that_leaves_the_window_is_pytorchs(family, built):
    packed, folder = built(family)
    model = OnnxModel(folder)
    answer = model.generate(tokens(40), 20)
    assert answer == greedy(load_dequantized(packed), tokens(40), len(answer))
    assert len(answer) > 10


def test_settings_that_config_json_leaves_out_are_the_familys_own(built, tmp_path):
    """The builder reads Gemma 3 as a Gemma 2, which caps logits and alternates layers where not told."""
    packed, _ = built("gemma3")
    bare = shutil.copytree(packed, tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text())
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "layer_types"):
        del config[key]
    (bare / "config.json").write_text(
        json.dumps(config)
    )  # both layers slide: the default is 5 of 6
    long = tokens(100)
    expected = logits(load_dequantized(bare), long)
    same(OnnxModel(exported(bare, tmp_path / "onnx")).logits(long), expected)


@pytest.mark.parametrize("family", ["granite", "gemma3"])
def test_onnx_runtime_finds_no_shape_wrong_and_nothing_unused(family, built, capfd):
    """Both scale the embedding, whose output the graph with adapters flattens; Gemma's scale is replaced."""
    _, folder = built(family)
    for name in ("model.onnx", "lora.onnx"):
        InferenceSession(folder / name, providers=["CPUExecutionProvider"])
    said = capfd.readouterr().err
    assert "MergeShapeInfo" not in said
    assert "not used by any node" not in said
