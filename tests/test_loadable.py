"""A base model that later stages could not take is refused at fetch, by name."""

import json

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from stages import loadable, random_model
from stages.errors import UserError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def folder(tmp_path):
    """A tiny model with an untied head."""
    random_model.make(
        {**LLAMA, "tie_word_embeddings": False}, 300, ROOT / "data/travel.jsonl", tmp_path
    )
    return tmp_path


def edit(folder, change) -> None:
    """Change the tensors of a model."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def configure(folder, **values) -> None:
    """Change values of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_whole_model_is_taken(folder):
    loadable.check(folder)


def test_a_head_that_is_neither_there_nor_tied_is_named(folder):
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"^lm_head\.weight is missing .* tie_word_embeddings"):
        loadable.check(folder)
    configure(folder, tie_word_embeddings=True)
    loadable.check(folder)


def test_a_missing_tensor_and_one_of_another_shape_are_named(folder):
    norm = "model.layers.0.input_layernorm.weight"
    edit(folder, lambda tensors: tensors.update({norm: torch.ones(31)}))
    with pytest.raises(UserError, match=rf"{norm} at model.source is \[31\], .* asks for \[32\]"):
        loadable.check(folder)
    edit(folder, lambda tensors: tensors.pop(norm))
    with pytest.raises(UserError, match=rf"^{norm} is missing"):
        loadable.check(folder)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / loadable.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing"):
        loadable.check(folder)


@pytest.mark.parametrize("kind", ["gpt2", "no-such-model"])
def test_a_family_that_later_stages_do_not_know_is_named(folder, kind):
    configure(folder, model_type=kind)
    with pytest.raises(UserError, match=kind):
        loadable.check(folder)


def test_a_template_that_cannot_be_rendered_is_refused_with_its_own_words(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users, please') }}")
    with pytest.raises(UserError, match=r"chat template .* no users, please"):
        loadable.check(folder)
