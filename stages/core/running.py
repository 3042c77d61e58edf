"""How a stage runs: alone, quietly, all or nothing.

    if __name__ == "__main__":
        run(quantize, COST)          # quantize(settings) -> what it made, in words

`run` checks params.yaml, turns every error that a user can fix into one line and a non-zero exit, and
writes what the run cost (seconds, peak memory, on which machine) to a file of its own.
Those figures never repeat, so they are an output of their own, which only `report` reads.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from stages.core import process
from stages.core.errors import UserError
from stages.core.files import (
    write_json,
)
from stages.core.machine import machine, used_gpu

if TYPE_CHECKING:
    from stages.core.settings import Settings

RAN_OUT = {
    "No space left on device|os error 28|PytorchStreamWriter failed|[Dd]isk quota exceeded": (
        "the disk is full: free some space, then run `dvc repro` again"
    ),
    "MemoryError|OutOfMemoryError|out of memory|bad_alloc|bad allocation|[Aa]llocate memory": (
        "out of memory: close other programs or choose a smaller model"
    ),
}


def run(stage: Callable[[Settings], str], cost_file: Path | None = None) -> None:
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
        seconds = time.monotonic() - process.STARTED  # the imports are part of it
        cost = {"seconds": round(seconds, 1), **peak_memory(), "machine": machine()}
        if cost_file is not None:
            write_json(cost_file, cost)
        took = f"in {cost['seconds']} s, peak memory {cost['peak_memory_gib']} GiB"
        chosen = f", on {process.chosen_gpu}" if process.chosen_gpu and used_gpu() else ""
        print(f"{name}: {made} {took}{chosen}")


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn errors that a user can fix into one line and exit code 1; a bug still shows its traceback."""
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
    if not isinstance(error, OSError) or error.filename is None:
        return None
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
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


def peak_memory() -> dict[str, float]:
    """Return the peak resident memory of this process, and of the GPU where one was used, in GiB."""
    peak = {"peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return peak
