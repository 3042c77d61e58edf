"""Bring a registered model back from Azure ML, to a folder from which `lab chat` runs.

lab download ft-for-travel                 # the newest version, to ft-for-travel-3
lab download ft-for-travel:2 --to models/shipped

Files stream to the disk, whatever their size, and are checked against the hash that `lab register` noted.
A download that was interrupted leaves no folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lab.azureml import workspace
from lab.azureml.datastore import Datastore, sha256
from stages import azureml
from stages.errors import UserError
from stages.running import in_megabytes, size_of, written_beside

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
        raise UserError(f"{folder} is there already: remove it, or name another with --to")
    bring(Datastore(client), found, folder)
    adapter = folder / "onnx_adapter/adapter.onnx_adapter"
    print(f"{folder} ({in_megabytes(size_of(folder))}), as registered. To talk to it:")
    print(f"lab chat --model {folder / 'onnx'} --adapter {found.name}={adapter}")


def find(client: MLClient, model: str) -> Model:
    """Return the version that NAME or NAME:VERSION means. Raises `UserError` where there is none."""
    from azure.core.exceptions import ResourceNotFoundError

    name, _, version = model.partition(":")
    with azureml.in_words():
        try:
            listed = {each.version: each for each in client.models.list(name)}
        except ResourceNotFoundError:
            listed = {}
    numbers = sorted((number for number in listed if number.isdigit()), key=int)
    wanted = version or (numbers[-1] if numbers else "")
    if wanted not in listed:
        known = ", ".join(numbers) or "none"
        raise UserError(f"no {name} version {version or 'at all'}: there is {known} (lab register)")
    return listed[wanted]


def bring(store: Datastore, model: Model, folder: Path) -> None:
    """Download a version's files beside `folder`, check them, and put them there in one step."""
    prefix = model.path.partition("/paths/")[2].strip("/")
    with written_beside(folder) as beside:
        names = store.download(prefix, beside)
        expected = (model.tags or {}).get("content_sha256")
        if not names:
            raise UserError(
                f"{model.name} version {model.version}: {prefix} is empty in the datastore"
            )
        if expected and sha256({name: beside / name for name in names}) != expected:
            raise UserError(
                f"{model.name} version {model.version} is not what was registered: files were changed or "
                "lost in the datastore; lab register sends them again"
            )
