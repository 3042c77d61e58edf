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
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from stages.core import gpu_faults, live, process, ranks
from stages.core.errors import UserError
from stages.core.files import write_json
from stages.core.machine import machine, used_gpu

if TYPE_CHECKING:
    from stages.core.settings import Settings

RAN_OUT = {
    "No space left on device|os error 28|PytorchStreamWriter failed|[Dd]isk quota exceeded": (
        "the disk is full: free some space, then run `dvc repro` again"
    ),
    "CUDA out of memory|CUDA failure 2:|CU(DNN|BLAS)_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation": (
        "the GPU is out of memory: close what else uses it (nvidia-smi), or turn down what docs/gpu.md names "
        "for this stage, such as -S experiment=packed or finetune.batch_size"
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
    with one_line_errors(name), watched(name) as ends:
        settings = load_current()
        made = stage(settings)
        seconds = time.monotonic() - process.STARTED  # the imports are part of it
        gpus = [report["gpu"] for report in ranks.reports if report["gpu"]]
        cost = {"seconds": round(seconds, 1), **largest_memory(), "machine": machine(gpus)}
        if cost_file is not None:
            write_json(cost_file, cost)
        took = f"in {cost['seconds']} s, peak memory {cost['peak_memory_gib']} GiB"
        chosen = f", on {process.chosen_gpu}" if process.chosen_gpu and used_gpu() else ""
        ends(f"{made} {took}{chosen}")
        print(f"{name}: {made} {took}{chosen}")


@contextmanager
def watched(name: str) -> Iterator[live.Ends]:
    """Let `lab watch` see the stage, and the line in which it fails."""
    with live.told(name) as ends:
        try:
            yield ends
        except BaseException as error:
            ends(line_of(error) or f"{type(error).__name__}: {error}".splitlines()[0], well=False)
            raise


def run_as_rank(stage: Callable[[Settings], None]) -> None:
    """Do a rank's part of a stage, and report to the stage what it cost or why it failed."""
    from stages.core.settings import load_current

    here = ranks.place()
    assert here is not None  # noqa: S101  # who calls this has asked
    be_quiet()
    code = 0
    try:
        stage(load_current())
        name = sys.modules["torch"].cuda.get_device_name() if used_gpu() else ""
        report = peak_memory() | {"gpu": name}
    except BaseException as error:  # noqa: BLE001  # the stage says what it was
        report = {"time": time.time(), "line": line_of(error), "traceback": traceback.format_exc()}
        code = 1
    write_json(here.folder / f"{here.rank}.json", report)
    sys.stdout.flush()
    os._exit(code)  # what a library would tidy up may wait for a rank that is gone


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn errors that a user can fix into one line and exit code 1; a bug still shows its traceback."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if line := line_of(error):
            # a model that a failed function held would end after CUDA's libraries: a segmentation fault
            traceback.clear_frames(error.__traceback__)
            sys.exit(f"{name}: {line}")
        raise


def line_of(error: BaseException) -> str | None:
    """Return what a user reads of an error; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if not isinstance(error, Exception):
        return None
    return what_ran_out(error) or what_is_forbidden(error) or gpu_faults.what_to_do(str(error))


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


def largest_memory() -> dict[str, float]:
    """Return `peak_memory` of this process or of that rank of it which took most."""
    all_of_them = [peak_memory(), *ranks.reports]
    names = ("peak_memory_gib", "peak_gpu_memory_gib")
    found = {name: [each[name] for each in all_of_them if name in each] for name in names}
    return {name: max(values) for name, values in found.items() if values}


def peak_memory() -> dict[str, float]:
    """Return the peak resident memory of this process, and of the GPU where one was used, in GiB."""
    peak = {"peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return peak
