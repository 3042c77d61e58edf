"""The finetune stage's losses, step by step, are the numbers that this file keeps.

A change of them that nobody meant, here or in torch, PEFT, TRL and transformers, shows before a model has
been trained on it for hours. Where one was meant, put the printed curve into GOLDEN.
"""

import json
from functools import partial

import pytest
import torch
from transformers import set_seed

from stages.core.settings import Finetune
from stages.text.chats import load_tokenizer
from stages.training import trainer
from stages.training.rows import load_rows, order_rows
from support.tiny_models import FAMILIES, checkpoint

OPTIONS = Finetune(
    rank=4,
    alpha=8,
    dropout=0.0,
    use_rslora=False,
    target_modules="all-linear",
    layers="all",
    max_steps=20,
    batch_size=4,
    max_length=128,
    lr=5e-3,
    warmup_steps=2,
    scheduler="cosine",
    weight_decay=0.0,
    eval_steps=5,
    validation_rows=4,
    base="dequantized",
    processes="auto",
    shard=False,
    gradient_checkpointing=False,
    seed=0,
)
GOLDEN = {
    "train": {5: 5.7165, 10: 4.0772, 15: 2.932, 20: 2.5651},
    "validation": {5: 4.8703, 10: 3.5111, 15: 2.9415, 20: 2.8484},
}
# One thread or two, with instructions from SSE to AVX-512, sums in another order change less than 3e-7 of
# a loss, and the four decimals that are kept 2e-5; 1 % more lr or alpha changes the last losses by over 4e-3.
TOLERANCE = 2e-4


def rows(first: int, last: int) -> str:
    """Return sums as conversations, a JSON line each, as `prepare` writes them."""
    lines = []
    for n in range(first, last):
        question = {"role": "user", "content": f"what is {n} plus {n + 3}?"}
        answer = {"role": "assistant", "content": f"it is {2 * n + 3}."}
        lines.append(json.dumps({"messages": [question, answer], "source": f"sums:{n}"}) + "\n")
    return "".join(lines)


@pytest.fixture
def curve_with(tmp_path, monkeypatch):
    """Return a function that trains a tiny 4-bit model in float32 on the CPU and returns its losses."""
    return partial(curve, tmp_path, monkeypatch)


def curve(tmp_path, monkeypatch, **changed):
    options = OPTIONS.model_copy(update=changed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(trainer, "fast_dtype", lambda: torch.float32)
    for name, numbers in {"train": (0, 40), "validation": (40, 44), "test": (44, 46)}.items():
        (tmp_path / f"{name}.jsonl").write_text(rows(*numbers), encoding="utf-8")
    folder, checkpoints = checkpoint(tmp_path / "made", FAMILIES["tied"]), tmp_path / "checkpoints"
    set_seed(options.seed)
    tokenizer = load_tokenizer(folder)
    training, validation = load_rows(tokenizer, tmp_path, options)
    base, ordered = trainer.load_base(folder, options), order_rows(training, options)
    made = trainer.make_trainer(base, tokenizer, ordered, validation, options, checkpoints)
    trainer.train(made, checkpoints)
    losses = trainer.loss_curve(made).items()
    return {split: {point["step"]: point["loss"] for point in points} for split, points in losses}


def golden(found) -> bool:
    return found == {split: pytest.approx(curve, rel=TOLERANCE) for split, curve in GOLDEN.items()}


def test_the_losses_are_those_of_the_golden_curve(curve_with):
    found = curve_with()
    print(found)
    assert golden(found)
