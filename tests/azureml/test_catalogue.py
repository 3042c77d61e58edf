"""Base models from a registry: weights, config and tokenizer, wherever they are kept, and no code."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save

from stages import fetch
from stages.core.errors import UserError
from stages.core.settings import CatalogueSource
from stages.sources import catalogue

pytestmark = pytest.mark.azure

URI = "azureml://registries/azureml/models/Phi-3.5-mini-instruct/versions/4"
CONFIG = json.dumps({"model_type": "phi3", "auto_map": {"AutoModel": "modeling.Evil"}}).encode()
WEIGHTS = save({"weight": np.ones(3, dtype=np.float32)})
SHARD = "model-00001-of-00001.safetensors"
INDEX = json.dumps({"weight_map": {"weight": SHARD}}).encode()
FILES = {
    "MLmodel": b"flavors: {}",
    "model/config.json": CONFIG,
    f"model/{SHARD}": WEIGHTS,
    "model/model.safetensors.index.json": INDEX,
    "model/modeling.py": b"evil",
    "components/tokenizer/tokenizer.json": b"{}",
    "components/tokenizer/tokenizer_config.json": b'{"chat_template": "x"}',
}


def source(uri: str = URI) -> CatalogueSource:
    return CatalogueSource(kind="azureml", uri=uri)


def test_a_model_of_the_catalogue_becomes_a_hugging_face_folder(network, tmp_path):
    network.publish("azureml", "Phi-3.5-mini-instruct", "4", FILES)
    folder = tmp_path / "base"
    folder.mkdir()
    fetch.from_catalogue(source(), folder)
    fetch.check_is_loadable(folder)
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        SHARD,
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (folder / SHARD).read_bytes() == WEIGHTS
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_a_model_that_is_not_there_is_named(network, tmp_path):
    with pytest.raises(UserError, match=r"no azureml://registries/azureml/models/Phi.*versions/4"):
        catalogue.download(source(), tmp_path)


def test_a_model_without_safetensors_is_refused(network, tmp_path):
    network.publish("azureml", "Phi-3.5-mini-instruct", "4", {"model/pytorch_model.bin": b"pickle"})
    (tmp_path / "base").mkdir()
    with pytest.raises(UserError, match=r"holds no \*\.safetensors"):
        fetch.from_catalogue(source(), tmp_path / "base")


def test_what_a_killed_fetch_leaves_lies_where_the_next_one_clears(monkeypatch, tmp_path):
    places = []
    monkeypatch.setattr(catalogue, "download", lambda source, folder: places.append(folder))
    with pytest.raises(UserError, match="holds no"):
        fetch.from_catalogue(source(), tmp_path)
    assert places[0].parent == tmp_path


def test_without_a_network_fetch_fails_in_seconds(network, tmp_path):
    network.relay.cut()
    with pytest.raises(UserError, match="does not answer: check the network"):
        catalogue.download(source(), tmp_path)
