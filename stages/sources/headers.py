"""The safetensors of a model folder: which files are the model's weights, and what their headers say.

transformers prefers a model.safetensors to the shards of an index, and loads whatever a shard holds. Here
the index decides, and a tensor that is in two files is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from stages.core.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor in a file; `dtype` as safetensors writes it, such as BF16 or F8_E4M3."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """Read the tensor."""
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor(self.name)


def names_of_files(folder: Path) -> list[str]:
    """Return the names of the files that hold the model: those in the index, else model.safetensors.

    Raises `UserError` for an index that names anything but files beside it.
    """
    if not (folder / INDEX).is_file():
        return [SINGLE]
    try:
        names = list(
            json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{INDEX} at model.source is not an index of shards: copy it again"
        ) from None
    for name in names:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise UserError(
                f"{INDEX} at model.source names {name!r}: weights must be *.safetensors files beside it"
            )
    return sorted(set(names))


def read_headers(folder: Path) -> dict[str, Stored]:
    """Return what the model's files hold, by name. Raises `UserError` for a missing or broken file."""
    found: dict[str, Stored] = {}
    for name in names_of_files(folder):
        file = folder / name
        if not file.is_file():
            raise UserError(missing(folder, name))
        for tensor in header_of(file):
            if tensor.name in found:
                both = f"{found[tensor.name].file.name} and {name}"
                raise UserError(
                    f"{tensor.name} is in {both} at model.source: save the model again, with one of them"
                )
            found[tensor.name] = tensor
    return found


def missing(folder: Path, name: str) -> str:
    """Say which file is missing and what to do."""
    if name == SINGLE:
        return (
            f"the model at model.source has no {SINGLE}: choose one that has, or an index of shards"
        )
    whole = f", or remove the index if {SINGLE} is whole" if (folder / SINGLE).is_file() else ""
    return f"{name} is missing at model.source, which {INDEX} names: copy it again{whole}"


def header_of(file: Path) -> list[Stored]:
    """Return what a file's header names. Raises `UserError` unless it fits the file's size."""
    try:
        with safe_open(file, framework="np") as tensors:
            names = tensors.keys()  # a handle is no mapping
            slices = {name: tensors.get_slice(name) for name in names}
            return [
                Stored(file, name, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            ]
    except SafetensorError:
        raise UserError(
            f"{file.name} at model.source holds no whole safetensors weights: "
            "run `git lfs pull` there, or copy it again"
        ) from None
