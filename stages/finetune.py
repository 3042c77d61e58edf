"""Train a LoRA adapter on the quantized model: models/quantized + data/prepared to models/adapter.

    python -m stages.finetune        # conf/finetune says how

Training runs on the 4-bit weights' own values, so that the adapter sees the error that inference will
have. Only the answer is trained, in the model's chat template.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

from stages.errors import UserError
from stages.parent import die_with_parent
from stages.running import in_megabytes, run, size_of
from stages.settings import Settings
from stages.training import ADAPTER, CHECKPOINTS, keep_or_clear_checkpoints, train


def finetune(settings: Settings) -> str:
    """Train, here or in several processes, and forget the checkpoints of a finished run."""
    options = settings.finetune
    keep_or_clear_checkpoints(options)
    if options.num_processes == 1:
        train(options)
    else:
        train_in_processes(options.num_processes)
    shutil.rmtree(CHECKPOINTS)
    return f"{ADAPTER} ({in_megabytes(size_of(ADAPTER))}) in {options.max_steps} steps"


def train_in_processes(count: int) -> None:
    """Run stages.training once per GPU (or CPU process); they end with this one."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", str(count), "-m", "stages.training"]
    if subprocess.run(command, preexec_fn=die_with_parent).returncode:
        raise UserError("a training process failed: its message stands above")


if __name__ == "__main__":
    run(finetune)
