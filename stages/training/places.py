"""Where the processes of a training run: which GPUs, or how many on the CPU."""

from __future__ import annotations

import psutil

from stages.core import gpu_locks, process
from stages.core.errors import UserError
from stages.core.settings import Finetune
from stages.weights.hardware import device

# Of a step, for each GPU: with two rows of 1024 tokens each, two H200 were slower than one at 3.8 billion
# parameters (0.94), with eight rows each 1.85 times as fast (benchmarks/results/several_gpus.json).
ROWS_THAT_PAY = 8


def places(options: Finetune) -> list[str]:
    """Return a GPU for every process that finetune.processes asks for, "" for one on the CPU.

    `auto` takes the visible GPUs that no other stage uses, as many as pay or, where one does not hold the
    base, all; while DVC's queue has several workers, no more than one worker's part of them. A number waits
    for that many. Raises `UserError` for more than are visible.
    """
    wanted, gpus = options.processes, process.gpus
    if device() == "cpu":
        found = [""] * (1 if wanted == "auto" else wanted)
    elif wanted == "auto":
        useful = options.batch_size // (1 if options.shard else ROWS_THAT_PAY)
        most = max(1, min(useful, len(gpus) // max(1, queue_workers())))
        found = gpu_locks.take(gpus, 1, most) if len(gpus) > 1 else gpus[:1] or [""]
    elif wanted > max(1, len(gpus)):
        raise UserError(
            f"finetune.processes is {wanted}, but {len(gpus)} of this machine's GPUs are visible: "
            f"must be auto or at most {len(gpus)}"
        )
    elif wanted == 1:
        found = gpus[:1]  # the one that the stage began on
    else:
        found = gpu_locks.take(gpus, wanted, wanted)
    if options.shard and len(found) == 1:
        print(
            "finetune: finetune.shard changes nothing in one process: the base is whole", flush=True
        )
    return found


def queue_workers() -> int:
    """Return how many workers `dvc queue start -j` has running here, each of which may want GPUs next."""
    lines = [each.info["cmdline"] or [] for each in psutil.process_iter(["cmdline"])]
    return sum("queue-worker" in line and any("dvc" in word for word in line) for line in lines)
