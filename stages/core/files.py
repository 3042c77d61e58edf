"""Files as the stages and lab read and write them: all or nothing, JSON without NaN, sizes."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.core.errors import UserError


@contextmanager
def written_beside(target: str | Path) -> Iterator[Path]:
    """Yield a path beside `target` to write to; rename it over `target` only when all went well."""
    target = Path(target)
    beside = target.with_name(f".{target.name}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(beside)
    try:
        yield beside
        share(beside)
        if beside.is_dir() or target.is_dir():  # only a file takes another file's place in one step
            _remove(target)
        beside.replace(target)
    finally:
        _remove(beside)


def share(path: Path) -> None:
    """Give files the user's usual mode: safetensors writes files that only their owner can read."""
    os.umask(mask := os.umask(0o077))  # it can only be read by setting it
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, all or nothing. Raises `UserError` for NaN, which is not JSON."""
    if strange := not_finite(value):
        raise UserError(
            f"{path}: {strange} is not a finite number: please report it with the command that you ran"
        )
    with written_beside(path) as beside:
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def not_finite(value: Any, name: str = "") -> str | None:
    """Return the dotted name of the first NaN or infinity in a JSON value, None where all is well."""
    if isinstance(value, float):
        return None if math.isfinite(value) else name
    if not isinstance(value, dict | list | tuple):
        return None
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    found = (not_finite(part, f"{name}.{key}".lstrip(".")) for key, part in parts)
    return next(filter(None, found), None)


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_jsonl(path: str | Path) -> list[Any]:
    """Read a JSON Lines file; U+2028 and its like, where `splitlines` cuts, may stand inside a text."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def size_of(path: str | Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    path = Path(path)
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def in_megabytes(size: int) -> str:
    """Write a number of bytes as people read it."""
    return f"{size / 1e6:.1f} MB"
