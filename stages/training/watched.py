"""What training tells `lab watch`: how far it is, loss, learning rate, gradient and speed.

trainer.add_callback(Watched(trainer))
"""

from __future__ import annotations

import time
from typing import Any

from transformers import Trainer, TrainerCallback

from stages.core import live
from stages.training import together

NAMES = {  # the trainer's, and ours
    "loss": "loss",
    "eval_loss": "validation_loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
}
STEPS = {"what": "training", "unit": "step"}


class Watched(TrainerCallback):
    """Tells every log, and between logs which step is done. It changes nothing of the training."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.progress = live.Progress()
        self.began = time.monotonic()
        self.first_step: int | None = None

    def on_train_begin(self, args, state, control, **_):
        """Tell the curve that a run before this one has left, whose checkpoint is resumed."""
        self.progress, self.began = live.Progress(), time.monotonic()
        for entry in state.log_history:
            self.tell(entry["step"], state.max_steps, entry, earlier=True)

    def on_step_end(self, args, state, control, **_):
        """Tell the step. The first one's loss too: it is logged after five, which may take minutes."""
        if self.first_step is None:
            self.first_step = state.global_step
            loss = {"loss": self.trainer.step_loss.item()}
            self.tell(state.global_step, state.max_steps, loss)
        else:
            self.progress.tell(state.global_step, state.max_steps, **STEPS)

    def on_log(self, args, state, control, logs=None, **_):
        """Tell what is logged."""
        seconds = time.monotonic() - self.began
        # other ranks have as many rows, of about the same length
        tokens = self.trainer.tokens_seen * together.count()
        speed = {} if "eval_loss" in logs else {"tokens_per_second": round(tokens / seconds)}
        self.tell(state.global_step, state.max_steps, logs, **speed)

    def tell(self, done: int, of: int, logs: dict[str, Any], **more: Any) -> None:
        """Write those logs that `lab watch` shows; none of the summary at the end."""
        values = {ours: float(logs[name]) for name, ours in NAMES.items() if name in logs}
        if values:
            live.tell(done=done, of=of, **STEPS, **values, **more)
