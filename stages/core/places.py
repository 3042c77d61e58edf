"""Where the processes of a stage run: on which GPUs, or how many on the CPU."""

from __future__ import annotations

from typing import Literal

import psutil

from stages.core import gpu_locks, process
from stages.core.errors import UserError


def places(key: str, wanted: Literal["auto"] | int, most: int, on_gpu: bool) -> list[str]:
    """Return a GPU for every process that the setting `key` asks for, "" for one on the CPU.

    `auto` takes the visible GPUs that no other stage uses, at most `most` of them; while DVC's queue has
    several workers, no more than one worker's part. A number waits for that many. Raises `UserError` for
    more than are visible.
    """
    gpus = process.gpus
    if not on_gpu:
        return [""] * (1 if wanted == "auto" else wanted)
    if wanted == "auto":
        most = min(most, max(1, len(gpus) // max(1, queue_workers())))
        return gpu_locks.take(gpus, 1, most) if len(gpus) > 1 else gpus[:1] or [""]
    if wanted > max(1, len(gpus)):
        raise UserError(
            f"{key} is {wanted}, but {len(gpus)} of this machine's GPUs are visible: "
            f"must be auto or at most {len(gpus)}"
        )
    if wanted == 1:
        return gpus[:1]  # the one that the stage began on
    return gpu_locks.take(gpus, wanted, wanted)


def queue_workers() -> int:
    """Return how many workers `dvc queue start -j` has running here, each of which may want GPUs next."""
    lines = [each.info["cmdline"] or [] for each in psutil.process_iter(["cmdline"])]
    return sum("queue-worker" in line and any("dvc" in word for word in line) for line in lines)
