"""How a stage runs: alone, quietly, all or nothing.

    if __name__ == "__main__":
        run(quantize)                # quantize(settings) -> what it made, in words

`run` checks params.yaml, turns every error that a user can cause into one line and a non-zero exit, and
writes what the run cost (seconds, peak memory, on which machine) to metrics/speed/<stage>.json.
Those figures never repeat, so they are an output of their own, which only `report` reads.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import math
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import GPU, STARTED
from stages.core.errors import UserError
from stages.core.machine import machine, used_gpu

if TYPE_CHECKING:
    from stages.core.settings import Settings

RUNTIME = Path("metrics/speed")
RAN_OUT = {
    "No space left on device|os error 28|PytorchStreamWriter failed|[Dd]isk quota exceeded": (
        "the disk is full: free some space, then run `dvc repro` again"
    ),
    "MemoryError|OutOfMemoryError|out of memory|bad_alloc|bad allocation|[Aa]llocate memory": (
        "out of memory: close other programs or choose a smaller model"
    ),
}


def run(stage: Callable[[Settings], str]) -> None:
    """Run one stage as a process of its own; the process's exit code says whether it succeeded."""
    # imported here: lab's commands use this module too, and most need no settings
    from stages.core.settings import load_current

    name = stage.__name__
    gc.freeze()  # what was imported stays to the end: looking through it took 2 of a stage's 5 seconds
    gc.enable()
    be_quiet()
    with one_line_errors(name):
        settings = load_current()
        made = stage(settings)
        seconds = time.monotonic() - STARTED  # the imports are part of it
        cost = {"seconds": round(seconds, 1), **peak_memory(), "machine": machine()}
        if name != "report":  # whose outputs git tracks
            write_json(RUNTIME / f"{name}.json", cost)
        took = f"in {cost['seconds']} s, peak memory {cost['peak_memory_gib']} GiB"
        print(f"{name}: {made} {took}{f', on {GPU}' if GPU and used_gpu() else ''}")


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Exit 1 with one line for whatever a user can put right; a bug still shows its traceback."""
    try:
        yield
    except UserError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")
    except Exception as error:
        if reason := what_ran_out(error) or what_is_forbidden(error):
            sys.exit(f"{name}: {reason}")
        raise


def what_ran_out(error: Exception) -> str | None:
    """Say that memory or the disk ran out, and what to do; None where it was something else.

    Only Python itself has exceptions of their own for that: torch, safetensors and ONNX Runtime say it
    in words.
    """
    text = f"{type(error).__name__}: {error}"
    return next((advice for words, advice in RAN_OUT.items() if re.search(words, text)), None)


def what_is_forbidden(error: Exception) -> str | None:
    """Say which file this user may not read or write; None where it was something else."""
    forbidden = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
    if not forbidden or error.filename is None:
        return None
    return f"{error.filename}: {error.strerror}: whose is it? this user has to read and write it"


def be_quiet() -> None:
    """Silence third-party chatter; progress bars stay."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what a talkative library prints to itself, unless it fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        try:
            with redirect_stdout(said), redirect_stderr(said):
                yield
        except Exception:
            said.seek(0)
            sys.stderr.write(said.read())
            raise


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
    """Give files the mode that this user's files have: safetensors writes files that nobody else can read."""
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
        raise UserError(f"{path}: {strange} is not a finite number: look at what measures it")
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


def peak_memory() -> dict[str, float]:
    """Return the peak resident memory of this process, and of the GPU where one was used, in GiB."""
    peak = {"peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return peak
