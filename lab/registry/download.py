"""Bring a registered model back from Azure ML, to a folder from which `lab chat` runs.

lab download ft-for-travel                 # the newest version, to ft-for-travel-3
lab download ft-for-travel:2 --to models/shipped

Files stream to the disk, whatever their size, and are checked against the hash that `lab register` noted.
A download that was interrupted leaves no folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lab.azureml import workspace
from lab.azureml.datastore import Datastore, sha256
from stages.core import azure
from stages.core.errors import UserError
from stages.core.files import in_megabytes, size_of, written_beside

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.ai.ml.entities import Model


def download(
    model: Annotated[str, typer.Argument(metavar="NAME[:VERSION]", help="Default: the newest.")],
    to: Annotated[Path | None, typer.Option(help="The folder [default: NAME-VERSION].")] = None,
) -> None:
    """Bring a registered model to a folder. Its adapter comes along."""
    client = workspace.need().connect()
    found = find(client, model)
    folder = to or Path(f"{found.name}-{found.version}")
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it, or name another with --to")
    checked = bring(client, found, folder)
    print(f"{folder} ({in_megabytes(size_of(folder))}), {checked}")
    adapter = folder / "onnx_adapter/adapter.onnx_adapter"
    if adapter.is_file():
        print(f"lab chat --model {folder / 'onnx'} --adapter {found.name}={adapter}")


def find(client: MLClient, model: str) -> Model:
    """Return the version that NAME or NAME:VERSION means. Raises `UserError` where there is none."""
    from azure.core.exceptions import ResourceNotFoundError

    name, _, version = model.partition(":")
    with azure.translate_errors():
        try:
            listed = {each.version: each for each in client.models.list(name)}
        except ResourceNotFoundError:
            listed = {}
    numbers = sorted((number for number in listed if number.isdigit()), key=int)
    wanted = version or (numbers[-1] if numbers else "")
    if wanted not in listed:
        known = ", ".join(numbers) or "none"
        raise UserError(
            f"{name} has no version {version or 'yet'}: registered are {known} (lab register)"
        )
    return listed[wanted]


def bring(client: MLClient, model: Model, folder: Path) -> str:
    """Download a version's files beside `folder`, check them, put them there in one step.

    Return whether they are known to be those that were registered.
    """
    which = f"{model.name} version {model.version}"
    store, path = place_of(client, model, which)
    with written_beside(folder) as beside:
        beside.mkdir()
        names = store.download(path, beside)
        expected = (model.tags or {}).get("content_sha256")
        if not names:
            raise UserError(
                f"{which}: datastore {store.name} holds nothing at {path}: it was removed there"
            )
        if expected and sha256({name: beside / name for name in names}) != expected:
            raise UserError(
                f"{which} is not what was registered: files were changed or "
                "lost in the datastore; lab register sends them again"
            )
    return "as registered" if expected else "unchecked: not registered by lab register, no hash"


def place_of(client: MLClient, model: Model, which: str) -> tuple[Datastore, str]:
    """Return the datastore and the path in it where a version lies.

    Raises `UserError` for one that lies elsewhere: in a job's outputs, in another workspace, at an address.
    """
    found = re.fullmatch(
        r"azureml:/?/?(?:.*/workspaces/(?P<workspace>[^/]+)/)?datastores/(?P<store>[^/]+)/paths/(?P<path>.+)",
        model.path or "",
    )
    if not found or found["workspace"] not in (None, client.workspace_name):
        raise UserError(
            f"{which} lies at {model.path}, not in a datastore of this workspace: "
            f"az ml model download --name {model.name} --version {model.version} brings it"
        )
    return Datastore(client, found["store"]), found["path"].strip("/")
