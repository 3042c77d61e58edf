"""A base model that later stages could not take whole is refused at fetch, by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from stages.core.errors import UserError
from stages.sources import headers, loadable, random_model
from support.project import ROOT
from support.tiny_models import FAMILIES, SHAPE

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q_BIAS, DOWN_BIAS = "self_attn.q_proj.bias", "mlp.down_proj.bias"
LAYER = "model.layers.0."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """Make a tiny model with a head of its own, once: training its tokenizer takes longest."""
    made = tmp_path_factory.mktemp("untied")
    random_model.make(
        {**LLAMA, "tie_word_embeddings": False}, 300, ROOT / "data/travel.jsonl", made
    )
    return made


@pytest.fixture
def folder(untied, tmp_path):
    """Copy the model for one test to change."""
    shutil.copytree(untied, tmp_path, dirs_exist_ok=True)
    return tmp_path


def edit(folder, change) -> None:
    """Change the tensors of a model."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def rename(folder, change) -> None:
    """Change the names of a model's tensors."""
    file = folder / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def configure(folder, **values) -> None:
    """Change values of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def add_token(folder, name: str, in_template: bool = False, **roles: str) -> None:
    """Add a token to the tokenizer alone, written by the chat template or in a role."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [name], **roles})
    if in_template:
        tokenizer.chat_template = name + tokenizer.chat_template
    tokenizer.save_pretrained(folder)


def refusal(folder) -> str:
    """Return the one line with which a model is refused."""
    with pytest.raises(UserError) as error:
        loadable.check(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_model_is_taken(folder):
    loadable.check(folder)


def test_weights_that_were_never_trained_are_said_to_be_no_better_than_chance(folder):
    edit(folder, lambda tensors: tensors[HEAD].mul_(100))
    assert "no better than chance" in loadable.check(folder)


def test_a_head_that_is_neither_there_nor_tied_is_named(folder):
    edit(folder, lambda tensors: tensors.pop(HEAD))
    message = refusal(folder)
    assert message.startswith("lm_head.weight is missing")
    assert "tie_word_embeddings" in message
    configure(folder, tie_word_embeddings=True)
    loadable.check(folder)


def test_a_missing_tensor_and_one_of_another_shape_are_named(folder):
    norm = f"{LAYER}input_layernorm.weight"
    edit(folder, lambda tensors: tensors.update({norm: torch.ones(31)}))
    assert refusal(folder) == f"{norm} at model.source is [31], but config.json asks for [64]"
    edit(folder, lambda tensors: tensors.pop(norm))
    assert refusal(folder).startswith(f"{norm} is missing")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (LAYER + Q_BIAS, "set attention_bias to true"),
        (LAYER + DOWN_BIAS, "set mlp_bias to true"),
        ("model.layers.1.mlp.up_proj.weight", "num_hidden_layers is 1 in config.json"),
        ("v_head.summary.weight", "a llama has no such tensor"),
    ],
)
def test_a_tensor_that_nobody_reads_is_named_with_the_setting_that_would(folder, name, key):
    edit(folder, lambda tensors: tensors.update({name: torch.ones(32)}))
    message = refusal(folder)
    assert message.startswith(f"nothing reads {name} at model.source")
    assert key in message


def test_a_head_that_is_not_the_embedding_is_refused_where_the_config_ties_them(folder):
    configure(folder, tie_word_embeddings=True)
    assert refusal(folder).startswith("lm_head.weight at model.source is not the embedding")
    edit(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    loadable.check(folder)


def test_rotations_that_old_checkpoints_store_are_no_loss(folder):
    name = f"{LAYER}self_attn.rotary_emb.inv_freq"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    loadable.check(folder)


def test_names_that_transformers_maps_are_taken_and_a_wrapper_s_are_refused(folder):
    rename(folder, lambda name: name.removeprefix("model."))
    loadable.check(folder)
    rename(folder, lambda name: f"_orig_mod.{name}")
    assert "save the model without its wrapper" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_holds_no_numbers_is_named(folder, value):
    name = f"{LAYER}mlp.up_proj.weight"
    edit(folder, lambda tensors: tensors[name][3, 4:5].fill_(value))
    assert refusal(folder).startswith(f"{name} at model.source holds NaN")


def test_a_tensor_in_two_shards_is_refused(folder):
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    shutil.move(folder / "model.safetensors", folder / "b.safetensors")
    index = {"weight_map": {HEAD: "a.safetensors", EMBEDDING: "b.safetensors"}}
    (folder / headers.INDEX).write_text(json.dumps(index))
    assert "is in a.safetensors and b.safetensors" in refusal(folder)


def test_a_token_that_the_template_writes_must_have_a_row_in_the_embedding(folder):
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    add_token(folder, "<|never|>")
    loadable.check(folder)
    add_token(folder, "<|turn|>", in_template=True)
    expected = f"<|turn|> is token {rows + 1}, but the embedding has {rows} rows"
    assert refusal(folder).startswith(expected)


def test_a_token_in_a_role_must_have_a_row_in_the_embedding(folder):
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    configure(folder, pad_token_id=rows)
    expected = f"pad_token_id in config.json at model.source is token {rows}, but the embedding has"
    assert refusal(folder).startswith(expected)
    add_token(folder, "<|pad|>", pad_token="<|pad|>")
    assert refusal(folder).startswith(f"<|pad|> is token {rows}, but the embedding has {rows} rows")


@pytest.mark.parametrize("kind", ["gpt2", "no-such-model"])
def test_a_family_that_later_stages_do_not_know_is_named(folder, kind):
    configure(folder, model_type=kind)
    assert kind in refusal(folder)


LONG = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_that_is_compared_with_pytorch_is_taken(family, tmp_path):
    # Qwen2's class of tokenizers adds a token to the trained ones, which needs a row
    described = SHAPE | FAMILIES[family] | {"vocab_size": 304}
    random_model.make(described, 300, ROOT / "data/travel.jsonl", tmp_path)
    loadable.check(tmp_path)  # raises nothing


PHI = {"model_type": "phi3", "original_max_position_embeddings": 64}
GEMMA = {"model_type": "gemma3_text", "head_dim": 16}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_scaling": LONG}, "rope type 'longrope'"),
        ({"rope_parameters": {**LONG, "rope_theta": 10000.0}}, "rope type 'longrope'"),
        ({**GEMMA, "rope_parameters": {"full_attention": LONG}}, "rope type 'longrope'"),
        ({**GEMMA, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({**GEMMA, "use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"model_type": "granite", "sliding_window": 16}, "sliding_window"),
        (
            {"model_type": "olmo2", "layer_types": ["full_attention"], "sliding_window": 16},
            "layer_types",
        ),
        ({**PHI, "partial_rotary_factor": 0.75}, "rotates 12 numbers in every head"),
        (
            {
                "model_type": "smollm3",
                "sliding_window": 16,
                "use_sliding_window": False,
                "layer_types": ["sliding_attention"],
            },
            "use_sliding_window false",
        ),
        ({"head_dim": 24}, "has 24 numbers in every head"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"sliding_window": 16}, "sliding_window"),
        (
            {"model_type": "phi3", "sliding_window": 16, "layer_types": ["full_attention"]},
            "layer_types",
        ),
        ({"rope_scaling": {"rope_type": "no-such"}}, "no-such"),
    ],
)
def test_a_setting_that_the_graph_cannot_follow_is_named(folder, settings, named):
    configure(folder, **settings)
    assert named in refusal(folder)


def test_a_template_that_cannot_be_rendered_is_refused_with_its_own_words(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users, please') }}")
    assert "no users, please" in refusal(folder)


@pytest.mark.parametrize(
    "settings", [{"hidden_act": "no-such"}, {"num_attention_heads": 5}, {"rms_norm_eps": "small"}]
)
def test_a_model_that_cannot_be_built_is_refused_in_one_line(folder, settings):
    configure(folder, **settings)
    assert "at model.source" in refusal(folder)


def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_line(folder):
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer at model.source" in refusal(folder)
