"""Versions that somebody else registered: their files lie elsewhere, and are theirs alone."""

from __future__ import annotations

import pytest

from lab.azureml import workspace
from lab.registry import download
from stages.core.errors import UserError

from .conftest import files_of
from .service import HOME

pytestmark = [pytest.mark.azure]

STORE = "azureml://datastores/workspaceblobstore/paths"


@pytest.fixture
def brought(network, tmp_path):
    """Register a version at an address, with blobs in the default datastore; bring it to a folder."""

    def bring(uri: str, blobs: dict[str, bytes]) -> tuple[str, dict[str, bytes]]:
        for name, content in blobs.items():
            network.datastore.upload_blob(name, content, overwrite=True)
        properties = {"modelUri": uri, "modelType": "custom_model", "flavors": {}}
        network.service.put(f"{HOME}/models/theirs", {"latestVersion": "1"})
        network.service.put(f"{HOME}/models/theirs/versions/1", properties)
        client = workspace.find().connect()
        said = download.bring(client, download.find(client, "theirs:1"), tmp_path / "got")
        return said, files_of(tmp_path / "got")

    return bring


def test_a_folder_comes_without_its_neighbours_of_the_same_beginning(brought):
    blobs = {
        "theirs/v1/a": b"a",
        "theirs/v1/sub/b": b"b",
        "theirs/v10/c": b"c",
        "theirs/v1.txt": b"d",
    }
    said, files = brought(f"{STORE}/theirs/v1/", blobs)
    assert files == {"a": b"a", "sub/b": b"b"}
    assert said.startswith("unchecked")


def test_a_version_may_be_one_file(brought):
    blobs = {"theirs/model.onnx": b"model", "theirs/model.onnx.data": b"data"}
    assert brought(f"{STORE}/theirs/model.onnx", blobs)[1] == {"model.onnx": b"model"}


@pytest.mark.parametrize(
    "uri",
    [
        "azureml://jobs/some_job/outputs/artifacts/paths/theirs/v1/",
        "runs:/some_job/theirs/v1",
        "https://somelab.blob.core.windows.net/models/theirs/v1",
        "azureml://subscriptions/s/resourceGroups/g/workspaces/another/datastores/x/paths/theirs/v1",
    ],
)
def test_a_version_that_lies_elsewhere_is_refused_with_the_command_that_brings_it(brought, uri):
    """Though the default datastore happens to have files at the same path."""
    with pytest.raises(UserError, match="az ml model download --name theirs --version 1"):
        brought(uri, {"theirs/v1/a": b"not theirs"})


def test_a_datastore_that_is_gone_is_named(brought):
    with pytest.raises(UserError, match="no datastore gone"):
        brought("azureml://datastores/gone/paths/theirs/v1", {"theirs/v1/a": b"not theirs"})


def test_files_that_were_removed_are_said_to_be_gone(brought, tmp_path):
    with pytest.raises(UserError, match="workspaceblobstore holds nothing at theirs/v1"):
        brought(f"{STORE}/theirs/v1", {})
    assert not (tmp_path / "got").exists()
