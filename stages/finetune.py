"""Train a LoRA adapter on the quantized model: models/quantized + data/prepared to models/adapter.

    python -m stages.finetune        # conf/finetune says how

Training runs on the 4-bit weights' own values, so that the adapter sees the error that inference will
have. Only answers are learned, in the model's chat template. With several GPUs each trains on a part of
every step's rows, in a process of its own that runs this module again (`train_adapter`).

A killed run leaves checkpoints outside DVC's outputs; the next run with the same settings, rows and base
resumes from the last one and ends with the same adapter, bit for bit.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import set_seed

from stages.core.files import in_megabytes, size_of, write_json, written_beside
from stages.core.ranks import leave, place, run_ranks
from stages.core.running import run, run_as_rank
from stages.core.settings import Settings
from stages.text.chats import load_tokenizer
from stages.training import checkpoints, together
from stages.training.places import places
from stages.training.rows import load_rows, order_rows
from stages.training.trainer import (
    load_base,
    loss_curve,
    make_trainer,
    save_adapter,
    train,
    training_cost,
)

QUANTIZED = Path("models/quantized")
PREPARED = Path("data/prepared")
ADAPTER = Path("models/adapter")
METRICS = Path("metrics/raw/finetune.json")
COST = Path("metrics/speed/finetune.json")
TRAINING_COST = Path("metrics/speed/training.json")  # of the loop alone
CHECKPOINTS = Path("models/.finetune")
AGAIN = (
    "run `dvc repro` again, which resumes (with fewer finetune.processes if the machine's memory "
    "ran out)"
)


def finetune(settings: Settings) -> str:
    """Train, in as many processes as settings and GPUs ask for, and forget the checkpoints."""
    options = settings.finetune
    checkpoints.keep_or_clear(CHECKPOINTS, checkpoints.fingerprint(options))
    gpus = places(options)
    if len(gpus) == 1:
        train_adapter(settings)
    else:
        run_ranks("stages.finetune", gpus, AGAIN)
    shutil.rmtree(CHECKPOINTS)
    ranks = f", {len(gpus)} processes" if len(gpus) > 1 else ""
    return f"{ADAPTER} ({in_megabytes(size_of(ADAPTER))}) in {options.max_steps} steps{ranks}"


def train_adapter(settings: Settings) -> None:
    """Load base and rows, train, save the adapter and its loss curve; all ranks do it, the first saves."""
    options = settings.finetune
    together.join()
    set_seed(options.seed)
    tokenizer = load_tokenizer(QUANTIZED)
    rows, validation = load_rows(tokenizer, PREPARED, options)
    base = load_base(QUANTIZED, options)
    ordered = order_rows(rows, options)
    trainer = make_trainer(base, tokenizer, ordered, validation, options, CHECKPOINTS)
    train(trainer, CHECKPOINTS)
    cost = training_cost(trainer)
    if together.rank() == 0:
        with written_beside(ADAPTER) as folder:
            save_adapter(trainer.model, folder, settings.model.name)
        write_json(METRICS, loss_curve(trainer))
        write_json(TRAINING_COST, cost)
    leave()


if __name__ == "__main__":
    run_as_rank(train_adapter) if place() else run(finetune, COST)
