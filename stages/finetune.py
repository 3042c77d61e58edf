"""Train a LoRA adapter on the quantized model: models/quantized + data/prepared to models/adapter.

    python -m stages.finetune        # conf/finetune says how

Training runs on the 4-bit weights' own values, so that the adapter sees the error that inference will
have. Only the answer is trained, in the model's chat template.
"""

from __future__ import annotations

import shutil

from stages.core.running import in_megabytes, run, size_of
from stages.core.settings import Settings
from stages.training.trainer import ADAPTER, CHECKPOINTS, keep_or_clear_checkpoints, train


def finetune(settings: Settings) -> str:
    """Train, and forget the checkpoints of a finished run."""
    options = settings.finetune
    keep_or_clear_checkpoints(options)
    train(options, settings.model.name)
    shutil.rmtree(CHECKPOINTS)
    return f"{ADAPTER} ({in_megabytes(size_of(ADAPTER))}) in {options.max_steps} steps"


if __name__ == "__main__":
    run(finetune)
