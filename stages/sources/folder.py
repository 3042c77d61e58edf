"""A base model from a local folder, pinned by a sha256 over its files where one is given."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from stages.core.errors import UserError
from stages.core.settings import (
    PathSource,
)
from stages.sources import headers

TEXT_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
HUB_FILES = ["*.safetensors", *TEXT_FILES]
ADAPTER = "adapter_config.json"


def choose(folder: Path) -> tuple[list[Path], list[str]]:
    """Return a folder's files to take, and the names of those to leave out.

    transformers would load a stray model.safetensors in place of the index's shards, and attach an adapter.
    """
    own = headers.names_of_files(folder)
    found = sorted({file for pattern in HUB_FILES for file in folder.glob(pattern)})
    found = [file for file in found if not file.is_dir()]
    out = [
        file
        for file in found
        if file.name.startswith("adapter_")
        or (file.suffix == ".safetensors" and file.name not in own)
    ]
    return [file for file in found if file not in out], [file.name for file in out]


def leave_out(folder: Path) -> str:
    """Remove from a folder what does not belong to the model; return what to say of it."""
    check_is_no_adapter(folder)
    _, names = choose(folder)
    for name in names:
        (folder / name).unlink()
    return without(names)


def without(names: list[str]) -> str:
    """Say which files were left out."""
    return f", without {', '.join(names)}" if names else ""


def check_is_no_adapter(folder: Path) -> None:
    """Raise where there is an adapter, but no model that it could belong to."""
    if (folder / ADAPTER).is_file() and not (folder / headers.names_of_files(folder)[0]).is_file():
        raise UserError(
            "model.source holds an adapter without its base model: name the base model there "
            "(`lab adapt` takes the adapter)"
        )


def from_path(source: PathSource, folder: Path) -> str:
    """Copy a local Hugging Face folder: weights as safetensors only. Say how to pin it, unless it is."""
    origin = Path(source.path)
    check_is_no_adapter(origin)
    if not (origin / "config.json").is_file():
        raise UserError(f"model.source.path {origin} holds no config.json")
    files, left_out = choose(origin)
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is a link to a file that is missing: download the model again")
        # what a link points to, without its mode: the hub's cache is read-only
        shutil.copyfile(file, folder / file.name)
    found = digest_of(folder)
    if source.sha256 not in (None, found):
        raise UserError(
            f"{origin} has sha256 {found}, not model.source.sha256 {source.sha256}: "
            "bring the old files back, or give the new sha256 if they should have changed"
        )
    pin = "" if source.sha256 else f", to be pinned with model.source.sha256={found}"
    return without(left_out) + pin


def digest_of(folder: Path) -> str:
    """Return one sha256 over the name and the sha256 of every file of a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{found}  {file.name}\n".encode())
    return digest.hexdigest()
