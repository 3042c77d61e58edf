"""Register in Azure ML: a version of a model, its files in the workspace's default datastore."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.azureml.datastore import Datastore
from lab.registry.release import Release
from stages.core import azure
from stages.core.errors import UserError

if TYPE_CHECKING:
    from azure.ai.ml import MLClient


def register(client: MLClient, name: str, version: int | None, release: Release) -> None:
    """Send the files and create the version, unless it is there."""
    number = choose_version(client, name, version, release.content)
    if number is None:
        return
    from azure.ai.ml.entities import Model

    store = Datastore(client)
    prefix = f"models/{name}/{release.content}"
    print(f"Sending {release.size} to {store.uri(prefix)}")
    store.upload(release.files, prefix)
    model = Model(
        name=name,
        version=str(number),
        path=store.uri(prefix),
        type="custom_model",
        tags=release.tags,
        description="ONNX Runtime GenAI model (onnx/) with its LoRA adapter (onnx_adapter/)",
    )
    with azure.translate_errors():
        client.models.create_or_update(model)
    print(f"Registered {name} version {number}: az ml model download -n {name} -v {number}")


def choose_version(client: MLClient, name: str, wanted: int | None, content: str) -> int | None:
    """Return the version to create; None when the content is registered. Refuses to overwrite."""
    from azure.ai.ml.constants import ListViewType

    with azure.translate_errors():  # archived versions keep their numbers
        models = client.models.list(name, list_view_type=ListViewType.ALL)
        listed = {model.version: dict(model.tags or {}) for model in models}
    contents = {version: tags.get("content_sha256") for version, tags in listed.items()}
    if wanted is None:
        same = [version for version, known in contents.items() if known == content]
    else:
        same = [str(wanted)] if contents.get(str(wanted)) == content else []
    if same:
        print(f"{name} version {same[0]} holds this very content: nothing to do")
        return None
    # archived versions count: their numbers cannot be used again
    following = max((int(version) for version in listed if version.isdigit()), default=0) + 1
    if wanted is not None and str(wanted) in listed:
        raise UserError(
            f"{name} version {wanted} exists and holds another model: bump the version, --version {following}"
        )
    return wanted or following
