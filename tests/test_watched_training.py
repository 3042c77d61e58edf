"""What training tells while it runs, to `lab watch` and to trackers, and when it stops early."""

import csv
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from stages.core import live
from stages.training import trackers, trainer
from stages.training.trainer import PATIENCE, Diverged, StopsWhenDiverged, highest_loss
from support.project import ROOT
from test_loss_curve import curve, golden

DEAD = {"lr": 30.0, "warmup_steps": 0, "max_steps": 60, "eval_steps": 60, "scheduler": "constant"}
LOST = DEAD | {"lr": 1.0, "alpha": 256, "warmup_steps": 10, "scheduler": "constant_with_warmup"}


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Return the events that were told so far."""
    file = tmp_path / "live.jsonl"
    monkeypatch.setenv(live.FILE, str(file))
    return lambda: live.events(file)


def test_the_first_step_and_every_log_are_told_and_change_no_loss(told, tmp_path, monkeypatch):
    assert golden(curve(tmp_path, monkeypatch))
    first, *logged = [event for event in told() if "loss" in event]
    assert (first["done"], first["of"], first["unit"]) == (1, 20, "step")
    assert [event["done"] for event in logged] == [5, 10, 15, 20]
    assert logged[0].keys() >= {"learning_rate", "grad_norm", "tokens_per_second"}
    assert [event["done"] for event in told() if "validation_loss" in event] == [5, 10, 15, 20]


def adapter_after(folder, monkeypatch):
    """Return the adapter's weights after a training."""
    made, make = [], trainer.make_trainer
    monkeypatch.setattr(trainer, "make_trainer", lambda *a: made.append(make(*a)) or made[-1])
    folder.mkdir()
    curve(folder, monkeypatch)
    return [weight.detach().clone() for weight in trainer.trainable(made[0].model)]


@pytest.mark.slow
def test_the_adapter_is_the_same_to_the_last_bit_whoever_watches(tmp_path, monkeypatch):
    alone = adapter_after(tmp_path / "alone", monkeypatch)
    monkeypatch.setenv(live.FILE, str(tmp_path / "live.jsonl"))
    follow(monkeypatch, Broken)
    seen = adapter_after(tmp_path / "seen", monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(alone, seen, strict=True))


def test_a_resumed_run_tells_the_curve_that_the_run_before_left(told):
    state = SimpleNamespace(
        max_steps=20, log_history=[{"step": 5, "loss": 3.0}, {"step": 5, "eval_loss": 2.5}]
    )
    trainer.Watched(SimpleNamespace()).on_train_begin(None, state, None)
    assert [(e["done"], e.get("loss"), e.get("validation_loss")) for e in told()] == [
        (5, 3.0, None),
        (5, None, 2.5),
    ]
    assert all(event["earlier"] for event in told())


@pytest.mark.parametrize(
    ("settings", "says"),
    [(DEAD, "the gradient is 0 at step"), (LOST, "the loss diverges: 5.82 at the start, 5.64 at")],
)
def test_a_run_that_diverges_stops_with_one_line_and_leaves_no_checkpoint(
    settings, says, tmp_path, monkeypatch
):
    with pytest.raises(Diverged, match=says) as error:
        curve(tmp_path, monkeypatch, **settings)
    assert "lower finetune.lr" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "checkpoints").exists()


def stops_at(losses, gradients=1.0) -> int | None:
    """Return the number of the log at which a run with these losses is stopped."""
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=49152))
    state = SimpleNamespace(log_history=[], global_step=0)
    for number, loss in enumerate(losses, 1):
        log = {"loss": loss, "grad_norm": gradients}
        state.log_history.append(log)
        try:
            StopsWhenDiverged().on_log(None, state, None, logs=log, model=model)
        except Diverged:
            return number
    return None


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([2.0, 1.0, 0.5, 0.3, 0.2, 0.1], None),
        ([2.0, 1.0, 9.0, 9.0, 9.0, 1.0, 0.5], None),  # a spike that heals
        ([0.5, 1.9, 0.2, 1.9, 1.9, 1.9, 0.3], None),  # rows that differ
        ([2.0, 3.0, 4.0, 4.5, 4.9, 4.9, 4.9], None),  # worse, but not lost
        ([2.0, 1.0, 5.1, 5.1, 5.1, 5.1, 5.1], 2 + PATIENCE),
        ([2.0, 7.0, 8.0, 9.0, 9.0], 1 + PATIENCE),
        ([11.5, 11.6, 11.4, 11.5, 11.6], None),  # random weights, not yet better than chance
        ([9.0, 9.0, 10.9, 10.9, 10.9, 10.9], 2 + PATIENCE),
    ],
)
def test_only_a_loss_that_stays_far_above_its_start_stops_a_run(losses, stops):
    assert stops_at(losses) == stops


def test_the_default_training_never_comes_near_a_stop():
    with (ROOT / "metrics/plots/loss.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    losses = [float(row["loss"]) for row in rows]
    assert len(losses) > PATIENCE
    assert stops_at(losses) is None
    assert max(losses) < highest_loss(losses, 49152) / 2


def test_a_gradient_of_zero_stops_only_a_run_that_has_something_left_to_learn():
    assert stops_at([3.0] * 9, gradients=0.0) == PATIENCE + 1
    assert stops_at([0.0] * 9, gradients=0.0) is None


class Broken(TrainerCallback):
    """A tracker whose server is down."""

    def on_train_begin(self, *_, **__):
        raise ConnectionError("http://localhost:5000 refuses\nand more")


class Listening(TrainerCallback):
    """A tracker that keeps what it sees."""

    seen: list = []  # noqa: RUF012

    def on_log(self, args, state, control, logs=None, **_):
        self.seen.append((args.run_name, logs.get("loss")))


def follow(monkeypatch, kind):
    """Let a callback stand for TensorBoard's."""
    monkeypatch.setenv("LAB_REPORT", "tensorboard")
    monkeypatch.setitem(trackers.INSTALLED, "tensorboard", lambda: True)
    monkeypatch.setitem(trackers.integrations.INTEGRATION_TO_CALLBACK, "tensorboard", kind)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Trackers' files in a folder of the test's, and the environment as it was afterwards."""
    for name in ("TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in trackers.IMPATIENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def test_a_tracker_that_fails_is_one_line_and_training_goes_on(tmp_path, monkeypatch, capsys):
    follow(monkeypatch, Broken)
    assert golden(curve(tmp_path, monkeypatch))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "LAB_REPORT" in line]
    assert "tensorboard: fails (http://localhost:5000 refuses)" in line
    assert line.endswith("training goes on without it")


def test_a_tracker_sees_every_log_under_the_experiments_name(tmp_path, monkeypatch):
    follow(monkeypatch, Listening)
    monkeypatch.setenv("DVC_EXP_NAME", "bold-fish")
    Listening.seen.clear()
    assert golden(curve(tmp_path, monkeypatch))
    assert len([loss for _, loss in Listening.seen if loss is not None]) == 4
    assert {name for name, _ in Listening.seen} == {"bold-fish"}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("wandb", "LAB_REPORT=wandb: must be one of tensorboard, trackio, mlflow"),
        ("trackio", "LAB_REPORT=trackio: is not installed: pip install trackio"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line(asked, says, monkeypatch, capsys):
    monkeypatch.setitem(trackers.INSTALLED, "trackio", lambda: False)
    monkeypatch.setenv("LAB_REPORT", f"{asked}, {asked}")
    trackers.add_trackers(None)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"finetune: {says}; training goes on without it"


def test_nothing_is_published_unless_somebody_names_a_space(monkeypatch):
    training = SimpleNamespace(args=SimpleNamespace())
    trackers.prepare(training)
    assert training.args.trackio_static_space_id is False
