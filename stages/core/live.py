"""What a stage is at, in a file that `lab watch` reads. It is no output, so that nothing reruns for it.

    with told("quantize") as ends:                     # by `run`
        for layer in steps(layers, "AWQ", "layer"):    # a progress bar, and lines of the file
        tell(done=5, of=120, loss=2.1)
        ends("models/quantized by awq")

.dvc/tmp/live/EXPERIMENT/STAGE.jsonl lies in the repository that a person is in, also for a stage that runs in
a copy of it (`--temp`, `--queue`), which is gone when the run has ended. git and DVC ignore that folder.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from stages.core.parent import starter

FOLDER = Path(".dvc/tmp/live")
FILE = "OLIVE_LAB_LIVE"  # the file's path, for the stage's ranks and other processes
WORKSPACE = "workspace"  # in place of an experiment's name
KEPT = 30  # runs; with older ones a year of searches would fill the folder
PAUSE = 1.0  # seconds between two lines that only say how far it is
LINES = 500  # of a long loop: its pauses grow with the time that it has taken

Event = dict[str, Any]
Item = TypeVar("Item")


class Ends(Protocol):
    """Takes down how a stage ends."""

    def __call__(self, made: str, *, well: bool = True) -> None:
        """Keep what it made, or why it failed."""


@contextmanager
def told(stage: str) -> Iterator[Ends]:
    """Write that a stage begins, and how it ends: what it made, if somebody says so, or that it failed."""
    begin(stage)
    end = {"failed": "without a word"}

    def ends(made: str, *, well: bool = True) -> None:
        end.clear()
        end["ended" if well else "failed"] = made

    try:
        yield ends
    finally:
        tell(**end)


def begin(stage: str) -> None:
    """Begin the stage's file in the repository that was asked to run it; none outside of one."""
    os.environ.pop(FILE, None)
    root = Path(os.environ.get("DVC_ROOT") or ".").resolve()
    if not (root / ".dvc").is_dir():
        return
    folder = root / FOLDER / os.environ.get("DVC_EXP_NAME", WORKSPACE)
    os.environ[FILE] = str(folder / f"{stage}.jsonl")
    try:
        forget_old(root / FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        Path(os.environ[FILE]).write_text("", encoding="utf-8")
    except OSError as error:
        give_up(error)
    me = psutil.Process()
    dvc = starter(me) if "DVC_STAGE" in os.environ else None
    tell(stage=stage, process=identity(me), run=identity(dvc or me))


def tell(**values: Any) -> None:
    """Append a line to the stage's file. A disk that is full or read-only stops no stage."""
    if FILE not in os.environ:
        return
    line = json.dumps({"time": round(time.time(), 3), **values}) + "\n"
    try:
        with open(os.environ[FILE], "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        give_up(error)


def give_up(error: OSError) -> None:
    """Say once that nobody can watch, and write no more."""
    path = os.environ.pop(FILE)
    print(f"{path}: {error.strerror}: lab watch does not see this stage", flush=True)


def steps(items: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items under a progress bar, and tell how many are done."""
    from tqdm import tqdm  # lab's commands use this module too

    bar, far = tqdm(items, desc=what, unit=unit, total=total), Progress()
    for done, item in enumerate(bar, 1):
        yield item
        far.tell(done, bar.total, what=what, unit=unit)


class Progress:
    """How far a loop is: told seldom enough to cost nothing, the last step always."""

    def __init__(self) -> None:
        self.began = self.last = time.monotonic()

    def tell(self, done: int, of: int | None, **values: Any) -> None:
        """Tell how many are done, unless that was told just now."""
        now = time.monotonic()
        if done in (1, of) or now - self.last >= max(PAUSE, (now - self.began) / LINES):
            self.last = now
            tell(done=done, of=of, **values)


def identity(process: psutil.Process) -> list[float]:
    """Return what no other process has: a number alone is given again."""
    return [process.pid, process.create_time()]


def is_alive(found: list[float]) -> bool:
    """Say whether the process of an identity still runs here."""
    try:
        process = psutil.Process(int(found[0]))
        # clock and boot time are read anew, and may differ in the last digits
        return abs(process.create_time() - found[1]) < 1 and process.status() != "zombie"
    except psutil.Error:
        return False


def events(file: Path) -> list[Event]:
    """Return the lines of a stage's file, but for one that is still being written."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    found = []
    for line in lines[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # of a machine that went down while it wrote
    return found


def forget_old(folder: Path) -> None:
    """Remove all runs but those that told something last."""
    with suppress(FileNotFoundError):  # another run, which begins now, does the same
        for run in sorted(folder.glob("*/"), key=last_told, reverse=True)[KEPT:]:
            shutil.rmtree(run, ignore_errors=True)


def last_told(run: Path) -> float:
    """Return when a run told something last."""
    return max(path.stat().st_mtime for path in (run, *run.iterdir()))
