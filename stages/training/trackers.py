"""Trackers that a person asks for by LAB_REPORT=tensorboard,trackio,mlflow: transformers' own callbacks.

add_trackers(trainer)

A tracker is no setting: what is trained does not depend on it, nor on whether it works. One that is not
installed, or that fails, is named once, and the training goes on without it.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils as integrations

from stages.core import live

VARIABLE = "LAB_REPORT"
INSTALLED = {
    "tensorboard": integrations.is_tensorboard_available,
    "trackio": integrations.is_trackio_available,
    "mlflow": integrations.is_mlflow_available,
}
# MLflow's own patience with a server that is down is minutes for each call
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def add_trackers(trainer: Trainer) -> None:
    """Let the trackers that LAB_REPORT names follow the training; those that cannot are named."""
    for name in asked_for():
        if name not in INSTALLED:
            say(name, f"must be one of {', '.join(INSTALLED)}")
        elif not INSTALLED[name]():
            say(name, f"is not installed: pip install {name}")
        else:
            prepare(trainer)
            trainer.add_callback(Tracker(name))


def asked_for() -> list[str]:
    """Return the names in LAB_REPORT, each once."""
    return [*dict.fromkeys(os.environ.get(VARIABLE, "").replace(",", " ").split())]


def prepare(trainer: Trainer) -> None:
    """Keep what trackers write on this machine, where nobody told them of another place."""
    name = os.environ.get("DVC_EXP_NAME", live.WORKSPACE)
    # in the repository that a person is in: the copy that an experiment runs in is removed
    folder = os.path.abspath(os.path.join(os.environ.get("DVC_ROOT") or ".", ".dvc/tmp/trackers"))
    places = {
        "TENSORBOARD_LOGGING_DIR": f"{folder}/tensorboard/{name}",
        "TRACKIO_DIR": f"{folder}/trackio",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        **IMPATIENT,
    }
    os.makedirs(folder, exist_ok=True)
    for variable, value in places.items():
        os.environ.setdefault(variable, value)
    trainer.args.run_name = name
    if not os.environ.get("TRACKIO_SPACE_ID"):  # its callback would publish the finished run
        trainer.args.trackio_static_space_id = False


def say(name: str, why: str) -> None:
    """Name what a tracker lacks, in one line."""
    print(f"finetune: {VARIABLE}={name}: {why}; training goes on without it", flush=True)


class Tracker(TrainerCallback):
    """A callback of transformers, given up at its first error."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.callback: TrainerCallback | None = None
        self.failed = False

    def pass_on(self, event: str, *words: Any, **named: Any) -> None:
        """Let the callback see an event; it is made with the first."""
        if self.failed:
            return
        try:
            if self.callback is None:
                (kind,) = integrations.get_reporting_integration_callbacks([self.name])
                self.callback = kind()
            getattr(self.callback, event)(*words, **named)
        except Exception as error:  # noqa: BLE001  # whatever it is, the training matters more
            self.failed = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(self.name, f"fails ({reason[:200]})")

    def on_train_begin(self, args, state, control, **named):
        """Begin the tracker's run."""
        self.pass_on("on_train_begin", args, state, control, **named)

    def on_log(self, args, state, control, **named):
        """Report what is logged."""
        self.pass_on("on_log", args, state, control, **named)

    def on_train_end(self, args, state, control, **named):
        """End the tracker's run."""
        self.pass_on("on_train_end", args, state, control, **named)
