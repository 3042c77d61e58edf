"""Lease GPUs: two stages of this machine never use one GPU at a time, whoever started them.

    dvc exp run --queue -S 'finetune.lr=1e-4,3e-4' && dvc queue start -j 2    # each job gets its own GPU

A lease is a lock on a file per GPU, which the kernel gives back when the process ends, however it ends.
A stage sees only the GPUs that it leased (CUDA_VISIBLE_DEVICES), and waits while there are too few.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

from stages.errors import UserError
from stages.settings import Settings

FOLDER = Path(tempfile.gettempdir(), "olive-lab-leases")  # of the machine: all clones and users
VISIBLE = "CUDA_VISIBLE_DEVICES"
NEEDS = {
    "fetch": lambda settings: int(settings.model.source.kind == "random"),
    "quantize": lambda _: 1,
    "finetune": lambda settings: settings.finetune.num_processes,
    "optimize": lambda _: 1,
    "adapt": lambda _: 1,
    "evaluate": lambda _: 1,
    "benchmark": lambda _: 1,
}
held: list[TextIO] = []  # open as long as this process lives: closing a file would end its lease


def lease_gpus(stage: str, settings: Settings) -> float:
    """Wait for the GPUs that a stage needs and make them the only visible ones; return the seconds waited.

    Raises `UserError` where the machine has fewer than that. Without a GPU there is nothing to lease.
    """
    gpus, needed = visible_gpus(), NEEDS.get(stage, lambda _: 0)(settings)
    if not gpus or not needed:
        return 0.0
    if needed > len(gpus):
        raise UserError(f"finetune.num_processes is {needed}, but {len(gpus)} GPUs are visible")
    leased, started = take(gpus, needed), time.monotonic()
    if not leased:
        print(f"{stage}: waiting for a GPU, used by {users(gpus)}", file=sys.stderr, flush=True)
    while not leased:
        time.sleep(1)
        leased = take(gpus, needed)
    os.environ[VISIBLE] = ",".join(leased)
    return time.monotonic() - started


def visible_gpus() -> list[str]:
    """Return the UUIDs of the GPUs that this process may use, without touching CUDA."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True)
    found = listed.stdout.split() if listed.returncode == 0 else []
    if VISIBLE not in os.environ:
        return found
    names = [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    return [uuid for name in names for i, uuid in enumerate(found) if name in (str(i), uuid)]


def take(gpus: list[str], count: int) -> list[str]:
    """Lock `count` of the GPUs, all or none; return which."""
    leased: dict[str, TextIO] = {}
    for gpu in gpus:
        if len(leased) < count and (file := lock(gpu)):
            leased[gpu] = file
    if len(leased) < count:
        for file in leased.values():
            file.close()
        return []
    for file in leased.values():  # not before all are ours: a job that gets too few uses none
        sign(file)
    held.extend(leased.values())
    return list(leased)


def lock(gpu: str) -> TextIO | None:
    """Lock one GPU's file; None where another process has it."""
    file = open_shared(FOLDER / f"{gpu}.lock")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def sign(file: TextIO) -> None:
    """Write into a GPU's file who has it."""
    file.truncate(0)
    file.write(f"process {os.getpid()} in {Path.cwd()}")
    file.flush()


def open_shared(path: Path) -> TextIO:
    """Open a file that every user of the machine may lock."""
    umask = os.umask(0)
    try:
        path.parent.mkdir(mode=0o1777, exist_ok=True)
        if not path.exists():  # Linux lets nobody "create" another user's file in such a folder
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
    finally:
        os.umask(umask)
    return path.open("r+", encoding="utf-8")


def users(gpus: list[str]) -> str:
    """Say who has the GPUs; a file that nobody locks names its last user."""
    files = {gpu: lock(gpu) for gpu in gpus}
    for file in filter(None, files.values()):
        file.close()
    used = [FOLDER / f"{gpu}.lock" for gpu, file in files.items() if not file]
    return "; ".join(sorted({file.read_text(encoding="utf-8") for file in used})) or "another job"
