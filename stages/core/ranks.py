"""A stage in several processes, ranks, of one machine: started, watched and ended together.

    run_ranks("stages.finetune", gpus, AGAIN)   # in the stage: a rank for each GPU, "" for a CPU
    run_as_rank(train) if place() else run(finetune, COST)    # in its module, which every rank runs again
    join("nccl")                                # in a rank, before torch.distributed; nothing elsewhere

A rank that fails ends all of them with its one line; so does the end of the stage, however it comes. Neither
accelerate's launcher nor torch's elastic agent, on which that is built, does the latter, and both report an
error as a table of ranks and tracebacks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

from stages.core.errors import UserError
from stages.core.files import read_json
from stages.core.machine import VISIBLE

PLACE = "OLIVE_LAB_RANK"  # "1 2 /tmp/x": the second of two, whose common folder is /tmp/x
# by these a cluster's launcher says which of its processes a stage is: transformers would take a rank for it
OF_OTHERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
reports: list[dict[str, Any]] = []  # what the ranks of this stage cost, for `run`


@dataclass(frozen=True)
class Place:
    """Which rank of how many a process is, and the folder that they share while they run."""

    rank: int
    count: int
    folder: Path


def place() -> Place | None:
    """Return this process's place among the ranks; None in a stage that runs by itself."""
    if PLACE not in os.environ:
        return None
    rank, count, folder = os.environ[PLACE].split(" ", 2)
    return Place(int(rank), int(count), Path(folder))


def rank() -> int:
    """Return this process's number, 0 where it is alone."""
    return here.rank if (here := place()) else 0


def count() -> int:
    """Return how many processes do this stage together."""
    return here.count if (here := place()) else 1


def join(backend: str) -> None:
    """Meet the other ranks, over nccl or gloo. By a file: a port could be another experiment's."""
    if (here := place()) is None:
        return
    import torch  # this module is imported where nothing large may be

    # the ranks are of one machine: no other has to reach them, or may
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        backend,
        init_method=f"file://{here.folder}/store",
        rank=here.rank,
        world_size=here.count,
        timeout=timedelta(hours=1),  # a dead rank ends the stage; a slow one is waited for
        device_id=torch.device("cuda", 0) if backend == "nccl" else None,
    )


def leave() -> None:
    """Wait until all ranks have come here, and part."""
    if count() > 1:
        from torch import distributed

        distributed.barrier()
        distributed.destroy_process_group()


def run_ranks(module: str, gpus: list[str], again: str) -> None:
    """Run a stage's module in a process for each GPU until all have ended well.

    `again` says what to do where one was killed. Raises `UserError` with the line of the rank that failed;
    no other process is left then.
    """
    with tempfile.TemporaryDirectory(prefix="olive-lab-") as name:
        folder = Path(name)
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank, gpu in enumerate(gpus):
                ranks.append(start(module, Place(rank, len(gpus), folder), gpu))
            while None in (codes := [rank.poll() for rank in ranks]):
                raise_failure(codes, folder, again)
                time.sleep(0.1)
            raise_failure(codes, folder, again)
            reports.extend(read_json(folder / f"{rank}.json") for rank in range(len(gpus)))
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.wait()


def start(module: str, place: Place, gpu: str) -> subprocess.Popen[bytes]:
    """Start one rank. Its standard input ends with this process, and then it ends too.

    It has a session of its own: Ctrl-C comes to the stage alone, which ends the ranks.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OF_OTHERS}
    environment[PLACE] = f"{place.rank} {place.count} {place.folder}"
    if gpu:
        environment[VISIBLE] = gpu
    with (place.folder / f"{place.rank}.txt").open("wb") as said:
        first = place.rank == 0  # one progress bar
        return subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=None if first else said,
            stderr=None if first else said,
            env=environment,
            start_new_session=True,
        )


def raise_failure(codes: list[int | None], folder: Path, again: str) -> None:
    """Raise the error of the rank that failed, if one has: others fail because of it."""
    failed = {rank: code for rank, code in enumerate(codes) if code}
    if not failed:
        return
    sys.stderr.write("\n")  # the first rank's progress bar may stand there
    said = {rank: read_json(file) for rank in failed if (file := folder / f"{rank}.json").exists()}
    first = sorted(said, key=lambda rank: said[rank]["time"])
    if lines := [said[rank]["line"] for rank in first if said[rank]["line"]]:
        raise UserError(lines[0])
    of = f"of {len(codes)}"
    for rank, code in failed.items():
        if rank not in said:
            if code != -signal.SIGKILL:  # else it had no time to say anything
                sys.stderr.write((folder / f"{rank}.txt").read_text("utf-8", "replace"))
            how = (
                f"killed by {signal.Signals(-code).name}" if code < 0 else f"gone with code {code}"
            )
            raise UserError(f"process {rank + 1} {of} was {how}: {again}")
    sys.stderr.write(said[first[0]]["traceback"])
    raise UserError(f"process {first[0] + 1} {of} failed: its traceback is above")


def end_with_the_stage() -> None:
    """End this rank as soon as the stage that started it has ended, however it did."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)  # it may stand in a collective operation, which nothing else interrupts

    Thread(target=wait, daemon=True).start()
