"""Registering: what a version holds, what is refused, and what an interruption costs."""

from __future__ import annotations

import json

import pytest

from .conftest import files_of
from .service import HOME

pytestmark = [pytest.mark.azure, pytest.mark.slow]


def version(cloud, number: int = 1) -> dict:
    return cloud.service.resource_of(f"models/ft-for-travel/versions/{number}")["properties"]


def downloaded(client, folder, number: int = 1) -> dict[str, bytes]:
    client.models.download("ft-for-travel", str(number), download_path=folder)
    (onnx,) = folder.rglob("onnx")
    return files_of(onnx.parent)


def models(laptop) -> dict[str, bytes]:
    return {
        f"{folder}/{name}": data
        for folder in ("onnx", "onnx_adapter")
        for name, data in files_of(laptop.root / "models" / folder).items()
    }


def uploads(cloud) -> set[str]:
    return set(cloud.datastore.list_blob_names(name_starts_with="models/"))


@pytest.fixture
def client(network):
    from lab.azureml import workspace

    return workspace.find().connect()


def test_a_version_holds_the_model_byte_for_byte_and_says_how_it_was_made(
    laptop, cloud, client, tmp_path
):
    assert "Registered ft-for-travel version 1" in laptop.lab("register")
    assert downloaded(client, tmp_path / "download") == models(laptop)
    tags = version(cloud)["tags"]
    assert tags["git_commit"] == laptop.git("rev-parse", "HEAD").strip()
    assert json.loads(tags["finetune"])["max_steps"] == 2
    quality = json.loads((laptop.root / "metrics/quality.json").read_text())
    assert float(tags["rouge_l"]) == pytest.approx(quality["rouge_l"], rel=1e-5)
    assert len(tags) <= 50
    assert all(len(value) <= 1000 for value in tags.values())


def test_the_same_content_again_is_a_no_op(laptop, cloud):
    laptop.lab("register")
    before = uploads(cloud)
    assert "nothing to do" in laptop.lab("register")
    assert "nothing to do" in laptop.lab("register", "--version", "1")
    assert uploads(cloud) == before
    assert len(cloud.service.children(f"{HOME}/models/ft-for-travel/versions")) == 1


def test_other_content_under_a_version_is_refused_before_anything_is_sent(laptop, cloud):
    laptop.lab("register")
    before = uploads(cloud)
    (laptop.root / "models/onnx/remark.txt").write_text("another model")
    output = laptop.lab("register", "--version", "1", "--force", exits=1)
    assert output.splitlines()[-1].endswith("bump the version, --version 2")
    assert uploads(cloud) == before
    assert "version 2" in laptop.lab("register", "--force")
    assert "out of date" in version(cloud, 2)["tags"]["registered_despite"]


@pytest.mark.parametrize("left", ["first", "last", "truncated"])
def test_an_interrupted_upload_is_taken_up_where_it_stopped(laptop, cloud, client, tmp_path, left):
    laptop.lab("register")
    names = sorted(uploads(cloud))
    kept = names[0] if left == "first" else names[-1]
    for name in names:
        if name != kept:
            cloud.datastore.delete_blob(name)
    if left == "truncated":
        cloud.datastore.upload_blob(kept, b"half", overwrite=True)
    before = cloud.datastore.get_blob_client(kept).get_blob_properties()["etag"]
    cloud.service.resources.pop(f"{HOME}/models/ft-for-travel/versions/1".lower())
    assert "Registered ft-for-travel version 1" in laptop.lab("register")
    after = cloud.datastore.get_blob_client(kept).get_blob_properties()["etag"]
    assert (before == after) == (left != "truncated")
    assert downloaded(client, tmp_path / "download") == models(laptop)


def test_an_archived_version_keeps_its_number(laptop, cloud):
    laptop.lab("register")
    version(cloud)["isArchived"] = True
    assert "version 1 holds this very content" in laptop.lab("register")
    (laptop.root / "models/onnx/remark.txt").write_text("another model")
    assert "version 2" in laptop.lab("register", "--force")


def test_a_model_that_no_dvc_lock_explains_is_refused_in_one_line(laptop):
    (laptop.root / "dvc.lock").unlink()
    output = laptop.lab("register", "--force", exits=1)
    assert output.splitlines()[-1].startswith("lab: no dvc.lock here")
    assert "Traceback" not in output


def test_ignore_files_drop_nothing(laptop, client, tmp_path):
    for folder in ("models/onnx", "models", "."):
        (laptop.root / folder / ".amlignore").write_text("*\n")
    laptop.lab("register", "--force")
    found = downloaded(client, tmp_path / "download")
    assert "onnx/model.onnx.data" in found or "onnx/model.onnx" in found
    assert found == models(laptop)


def test_uncommitted_changes_failing_gates_and_stale_stages_are_refused_together(laptop, cloud):
    laptop.replace("params.yaml", "max_steps: 2", "max_steps: 3")
    laptop.replace("params.yaml", "gates: {}", "gates: {recall_exact_match: {minimum: 0.99}}")
    output = laptop.lab("register", exits=1)
    assert len(output.splitlines()) == 1
    for words in (
        "uncommitted changes",
        "gate recall_exact_match",
        "out of date: finetune",
    ):
        assert words in output
    assert uploads(cloud) == set()


def test_without_azure_git_registers_and_dvc_brings_a_version_back(laptop, tmp_path):
    alone = laptop.but(**dict.fromkeys(laptop.azure))
    assert "as v1.0.0" in alone.lab("register")
    assert "nothing to do" in alone.lab("register")
    assert alone.git("tag", "--list").split() == [
        "ft-for-travel-adapter@v1.0.0",
        "ft-for-travel@v1.0.0",
    ]
    for name, folder in (("", "onnx"), ("-adapter", "onnx_adapter")):
        target = tmp_path / "got" / folder
        target.parent.mkdir(exist_ok=True)
        words = ("--rev", "v1.0.0", "--out", str(target))
        alone.dvc("artifacts", "get", ".", f"ft-for-travel{name}", *words)
    assert files_of(tmp_path / "got") == models(alone)


def test_a_second_version_in_git_needs_a_new_number(laptop):
    laptop.lab("register", "--git")
    (laptop.root / "models/onnx/remark.txt").write_text("another model")
    laptop.dvc("commit", "--force", "optimize")
    laptop.commit()
    output = laptop.lab("register", "--git", "--force", "--version", "1", exits=1)
    assert output.splitlines()[-1].endswith("bump the version, --version 2")
    assert "as v2.0.0" in laptop.lab("register", "--git", "--force")


@pytest.mark.parametrize("missing", ["ft-for-travel", "ft-for-travel-adapter"])
def test_a_version_that_git_has_in_part_is_completed(laptop, missing):
    laptop.lab("register", "--git")
    laptop.git("tag", "--delete", f"{missing}@v1.0.0")
    assert f"Registered {missing} as v1.0.0" in laptop.lab("register", "--git")
    assert "nothing to do" in laptop.lab("register", "--git")
