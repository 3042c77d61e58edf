"""Runs of a search: one `dvc exp run --temp` each, under locks that keep others from the same work.

job = start(bench, point, more=(LOOKED_AT,), target=None, name="trial-…")   # None: others work on it
job.ended

A lock stands for a stage with its settings, is held by the run itself, and so goes when the run ends: when a
search is killed, its run may go on, and the next search waits for it instead of computing the same again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab.search.bench import Bench
from lab.search.space import Point

# what DVC and git say of two runs that begin, or end, in the same moment: neither waits for the other
COLLISION = re.compile(
    r"Unable to (acquire|create) .*lock|is busy, it is being blocked|FileLocked|cannot lock ref"
)
FOLDER = Path(".dvc/tmp/lab-search")  # locks, and what the runs print; git ignores it


@dataclass
class Job:
    """A run on its way."""

    point: Point
    name: str
    stages: list[str]  # that it has to run
    target: str | None  # the stage that it ends with; None: all
    process: subprocess.Popen
    log: Path
    locks: list[int]
    started: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> bool:
        """Whether it has ended, well or not."""
        return self.process.poll() is not None

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.started

    def close(self) -> None:
        """Let go of the locks."""
        release(self.locks)
        self.locks = []

    def stop(self) -> None:
        """End the run as Ctrl-C does, and wait for it: DVC tidies up."""
        if not self.ended:
            with contextlib.suppress(ProcessLookupError):  # the stage too, as a terminal does
                os.killpg(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.close()

    @property
    def collided(self) -> bool:
        """Whether it ended because another DVC was at work in the same moment."""
        return self.process.returncode != 0 and bool(COLLISION.search(self.said()))

    def said(self) -> str:
        """Return what the run printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def why(self) -> str:
        """Return what the run said last of what went wrong, in one line."""
        said = self.said().splitlines()
        ours = [line for line in said for stage in self.stages if line.startswith(f"{stage}: ")]
        dvcs = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
        return (ours[-1:] or dvcs[:1] or [f"exit code {self.process.returncode}"])[0]


def start(
    bench: Bench, point: Point, more: Sequence[str], target: str | None, name: str
) -> Job | None:
    """Start a run of a point, up to a stage where one is given. None while others compute a part of it."""
    stages = left(bench, point, more, target)
    locks = take_all([bench.recipe(stage, bench.settings(point, *more)) for stage in stages])
    if locks is None:
        return None
    bench.record.refresh()
    if left(bench, point, more, target) != stages or name in bench.runs():
        release(locks)  # others have just finished what was missing a moment ago
        return None
    settings = [word for text in (*bench.space.overrides(point), *more) for word in ("-S", text)]
    words = ["exp", "run", "--temp", "--name", name, *settings, *([target] if target else [])]
    log = FOLDER / f"{name}.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lab.remote.watched_dvc", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=locks,  # they are held until the run, not this process, has ended
            start_new_session=True,  # Ctrl-C is passed on once, by `stop`
        )
    return Job(point, name, stages, target, process, log, locks)


def left(bench: Bench, point: Point, more: Sequence[str], target: str | None) -> list[str]:
    """Return the stages that a run of a point would compute."""
    wanted = {target, *bench.record.needs[target]} if target else {*bench.record.stages}
    return [stage for stage in bench.missing(point, *more) if stage in wanted]


def take_all(names: Sequence[str]) -> list[int] | None:
    """Take several locks, or none of them."""
    locks: list[int] = []
    for name in names:
        lock = take(name)
        if lock is None:
            release(locks)
            return None
        locks.append(lock)
    return locks


def release(locks: Sequence[int]) -> None:
    """Let go of locks, as far as no run holds them."""
    for lock in locks:
        os.close(lock)


def take(name: str) -> int | None:
    """Take a lock, None where another process has it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    lock = os.open(FOLDER / f"{name[:32]}.lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


@contextlib.contextmanager
def ending(jobs: dict[Point, Job]) -> Iterator[None]:
    """End all runs when this search ends, also by SIGTERM; nothing of what they finished is lost."""

    def terminated(*_: object) -> None:
        sys.exit("lab: terminated; the same command continues")

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        for job in jobs.values():
            job.stop()
        signal.signal(signal.SIGTERM, before)
