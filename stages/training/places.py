"""Where the processes of a training run: which GPUs, or how many on the CPU."""

from __future__ import annotations

from stages.core import places as machine
from stages.core.settings import Finetune
from stages.weights.hardware import device

# Of a step, for each GPU: with two rows of 1024 tokens each, two H200 were slower than one at 3.8 billion
# parameters (0.94), with eight rows each 1.85 times as fast (benchmarks/results/several_gpus.json).
ROWS_THAT_PAY = 8


def places(options: Finetune) -> list[str]:
    """Return a GPU for every process that finetune.processes asks for; `auto` takes as many as pay.

    Where one does not hold the base, all: each has a row of a step.
    """
    wanted = options.processes
    most = options.batch_size // (1 if options.shard or wanted != "auto" else ROWS_THAT_PAY)
    found = machine.places("finetune.processes", wanted, max(1, most), device() == "cuda")
    if options.shard and len(found) == 1:
        print(
            "finetune: finetune.shard changes nothing in one process: the base is whole", flush=True
        )
    return found
