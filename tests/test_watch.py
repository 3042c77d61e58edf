"""lab watch: what a stage tells, what is made of it, and runs of DVC wherever they run."""

import os
import subprocess
import sys

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from lab.cli import app
from lab.watch import runs, view
from lab.watch.runs import Run, Stage
from stages.core import live, running
from stages.core.errors import UserError
from support.processes import output_of, wait_until
from support.project import ROOT, Project

BEGUN = {"time": 1000.0, "stage": "finetune"}
LOOP = {"of": 120, "what": "training", "unit": "step"}
LOGGED = {"learning_rate": 0.0014, "grad_norm": 0.61, "tokens_per_second": 1234}


def training(*losses: float) -> Stage:
    """A stage that logs a loss every fifth step, a step each second."""
    steps = [
        {"time": 1000.0 + 5 * n, "done": 5 * n, **LOOP, "loss": loss, **LOGGED}
        for n, loss in enumerate(losses, 1)
    ]
    return Stage("finetune", [BEGUN, *steps])


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder that passes for a repository, and this process for a stage's that DVC did not start."""
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(live.FILE, "")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").touch()
    return tmp_path


def watched(*words: str) -> str:
    done = CliRunner().invoke(app, ["watch", *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_is_its_stages_its_curves_and_what_is_left_in_80_columns():
    quantize = Stage("quantize", [{"time": 900.0, "ended": "models/quantized by awq " + "x" * 90}])
    run = Run("bold-fish", [quantize, training(4.0, 3.0, 2.5, 2.25)], alive=True)
    first, before, now, curves, spark = view.frame(run, 80, now=1030.0)
    assert first == "bold-fish"
    assert before.startswith("  quantize  models/quantized by awq xxx")
    assert len(before) == 80
    assert now == "  finetune  training, step 20 of 120, 16 %, 1:30 left"
    assert curves == "  loss 2.25, lr 0.0014, gradient 0.61, 1234 tokens/s"
    assert spark == "  █▄▂▁ 4 to 2.25"


def test_a_curve_of_any_length_fits_the_width_and_a_level_one_is_flat():
    assert view.sparkline([1.0] * 7, 40) == "▁" * 7
    assert view.sparkline(list(range(1000)), 8) == "▁▂▃▄▅▆▇█"


def test_what_a_resumed_run_had_before_counts_for_the_curve_and_not_for_the_pace():
    stage = training(4.0, 3.0, 2.5)
    for event in stage.events[1:3]:
        event["earlier"] = True
    assert stage.seconds_left(1020.0) is None
    assert stage.values("loss") == [4.0, 3.0, 2.5]


def test_a_pipe_gets_a_line_for_each_log_and_for_each_tenth_of_another_loop():
    layers = [
        {"time": 1.0 * n, "done": n, "of": 30, "what": "AWQ", "unit": "layer"} for n in range(1, 31)
    ]
    quantize, news = Stage("quantize", [BEGUN, *layers[:12]]), view.News()
    assert [line.partition(" of")[0] for line in news.lines(Run("x", [quantize], True))] == [
        f"quantize: AWQ, layer {n}" for n in (1, 4, 7, 10)
    ]
    quantize.events.extend([*layers[12:], {"time": 31.0, "ended": "models/quantized in 31 s"}])
    lines = list(news.lines(Run("x", [quantize, training(4.0, 3.0)], True)))
    assert lines[-4:] == [
        "quantize: AWQ, layer 30 of 30, 100 %",
        "quantize: models/quantized in 31 s",
        "finetune: training, step 5 of 120, 4 %, loss 4, lr 0.0014, gradient 0.61, 1234 tokens/s",
        "finetune: training, step 10 of 120, 8 %, loss 3, lr 0.0014, gradient 0.61, 1234 tokens/s, 1:50 left",
    ]
    assert list(news.lines(Run("x", [quantize, training(4.0, 3.0)], True))) == []


def test_a_stage_tells_where_it_is_and_what_it_made(repository):
    with live.told("quantize") as ends:
        assert list(live.steps("abc", "AWQ", "layer")) == ["a", "b", "c"]
        ends("models/quantized")
    (run,) = runs.runs()
    assert (run.name, run.alive) == ("workspace", True)
    assert [run.stages[0].loop[place]["done"] for place in (0, -1)] == [1, 3]
    assert run.stages[0].last["ended"] == "models/quantized"


def test_a_stage_that_fails_tells_its_one_line(repository):
    def fail():
        with running.watched("prepare"):
            raise UserError("data/travel.jsonl: line 3 is no JSON")

    with pytest.raises(UserError):
        fail()
    (stage,) = runs.runs()[0].stages
    assert view.says(stage, False, 0.0) == "failed: data/travel.jsonl: line 3 is no JSON"


def test_a_file_that_cannot_be_written_is_one_line_and_stops_nothing(repository, capsys):
    (repository / live.FOLDER).parent.mkdir()
    (repository / live.FOLDER).write_text("in the way")
    with live.told("quantize") as ends:
        assert len(list(live.steps(range(3), "AWQ", "layer"))) == 3
        ends("models/quantized")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("lab watch does not see this stage")


def test_outside_of_a_repository_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv(live.FILE, "that of another stage")
    with live.told("quantize"):
        live.tell(done=1, of=2)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_the_repository_tells_the_repository_itself_by_the_experiments_name(
    repository, tmp_path, monkeypatch
):
    monkeypatch.setenv("DVC_ROOT", str(repository))
    monkeypatch.setenv("DVC_EXP_NAME", "bold-fish")
    (repository / "copy").mkdir()
    monkeypatch.chdir(repository / "copy")
    with live.told("finetune"):
        live.tell(done=1, of=2)
    assert [run.name for run in runs.runs(repository)] == ["bold-fish"]


def test_only_the_newest_runs_are_kept(repository, monkeypatch):
    for number in range(live.KEPT + 3):
        folder = repository / live.FOLDER / f"run-{number}"
        folder.mkdir(parents=True)
        if number == 1:
            (folder / "finetune.jsonl").touch()  # begun long ago, and still at work
        os.utime(folder, (number, number))
    live.begin("finetune")
    left = {folder.name for folder in (repository / live.FOLDER).iterdir()}
    assert len(left) == live.KEPT + 1
    assert "run-1" in left
    assert left.isdisjoint({"run-0", "run-2"})


def gone() -> list[float]:
    """Return the identity of a process that has ended."""
    process = subprocess.Popen(["true"])
    found = [process.pid, psutil.Process(process.pid).create_time()]
    process.wait()
    return found


def test_where_nothing_runs_it_is_one_line_and_the_last_runs_end(repository, monkeypatch):
    assert watched().startswith("nothing runs here, and nothing did")
    monkeypatch.setattr(live, "identity", lambda _: gone())
    with live.told("finetune") as ends:
        live.tell(done=5, **LOOP, loss=4.0)
        live.tell(done=10, **LOOP, loss=2.0)
        ends("models/adapter in 7 s")
    said = watched().splitlines()
    assert said[0] == "nothing runs here; the last that was seen:"
    assert said[1:4] == ["workspace", "  finetune  models/adapter in 7 s", "  loss 2"]
    assert watched("workspace").startswith("it has ended")


def test_a_run_that_was_killed_is_called_so(repository, monkeypatch):
    monkeypatch.setattr(live, "identity", lambda _: gone())
    live.begin("finetune")
    live.tell(done=5, **LOOP, loss=4.0)
    assert "finetune: ended without a word: was it killed?" in watched()


def test_stages_of_an_older_run_are_not_taken_for_this_ones(repository, monkeypatch):
    monkeypatch.setattr(live, "identity", lambda _: gone())
    with live.told("quantize") as ends:
        ends("of yesterday")
    monkeypatch.setattr(live, "identity", lambda _: [1, 0.0])
    with live.told("finetune") as ends:
        ends("of today")
    assert [stage.name for stage in runs.runs(repository)[0].stages] == ["finetune"]


def test_the_end_that_a_run_tells_while_it_is_looked_at_is_seen(repository, monkeypatch):
    live.begin("finetune")

    def ends_now(_) -> bool:
        live.tell(ended="models/adapter")
        return False

    monkeypatch.setattr(live, "is_alive", ends_now)
    assert runs.runs()[0].stages[0].has_ended


def test_a_run_is_followed_to_its_end_in_place(repository, monkeypatch, capsys):
    from lab.watch import command

    looks = [
        Run("bold-fish", [training(4.0)], alive=True),
        Run("bold-fish", [training(4.0, 3.0)], alive=True),
        Run("bold-fish", [Stage("finetune", [BEGUN, {"time": 1.0, "ended": "done"}])], alive=False),
    ]
    command.renew(lambda: looks.pop(0), pause=0)
    said = capsys.readouterr().out
    assert said.count("\x1b[4F\x1b[J") == 2
    assert said.endswith("bold-fish\n  finetune  done\n")


WORK = """
import os, sys, time
from pathlib import Path
from stages.core import live

with live.told(sys.argv[1]) as ends:
    live.tell(done=1, of=2, what="training", unit="step", loss=3.5)
    while not Path(os.environ["GATE"]).exists():
        time.sleep(0.02)
    live.tell(done=2, of=2, what="training", unit="step", loss=1.5)
    Path(sys.argv[1]).write_text("made")
    ends(f"{sys.argv[1]} is made")
"""


@pytest.fixture
def pipeline(tmp_path, monkeypatch) -> Project:
    """Two stages that stop at step 1 until a file, the gate, is there."""
    project = Project(tmp_path / "project")
    project.root.mkdir()
    stages = {
        "one": {"cmd": "python work.py one", "outs": ["one"]},
        "two": {"cmd": "python work.py two", "deps": ["one"], "outs": ["two"]},
    }
    (project.root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (project.root / "work.py").write_text(WORK)
    project.git("init", "--quiet")
    project.dvc("init", "--quiet")
    project.commit()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("GATE", str(tmp_path / "gate"))
    return project


@pytest.mark.slow
@pytest.mark.parametrize(
    ("commands", "name"),
    [
        ([["repro"]], "workspace"),
        ([["exp", "run", "--temp", "--name", "bold-fish"]], "bold-fish"),
        ([["exp", "run", "--queue", "--name", "shy-cat"], ["queue", "start"]], "shy-cat"),
    ],
    ids=["workspace", "temp", "queue"],
)
def test_a_run_of_dvc_is_followed_from_stage_to_stage_to_its_end(
    pipeline, tmp_path, commands, name
):
    *first, last = commands
    for words in first:
        pipeline.dvc(*words)
    run = pipeline.start(sys.executable, "-m", "dvc", *last)
    file = pipeline.root / live.FOLDER / name / "one.jsonl"
    wait_until(lambda: len(live.events(file)) > 1)
    watching = pipeline.start(sys.executable, "-m", "lab.cli", "watch")
    assert "step 1 of 2" in watching.stdout.readline()
    (tmp_path / "gate").touch()
    said = output_of(watching)
    output_of(run)
    assert [line for line in said.splitlines() if "made" in line] == [
        "one: one is made",
        "two: two is made",
    ]
    assert pipeline.git("status", "--porcelain", "--untracked-files=no").split() in (
        [],
        ["M", ".gitignore"],
    )
    wait_until(lambda: "nothing runs here" in pipeline.python("lab.cli", "watch"))
    assert "loss 1.5" in pipeline.python("lab.cli", "watch", name)


@pytest.mark.slow
def test_an_experiment_that_waits_in_the_queue_is_told_from_one_that_nobody_knows(pipeline):
    pipeline.dvc("exp", "run", "--queue", "--name", "shy-cat")
    queued = pipeline.python("lab.cli", "watch", "shy-cat", exits=1)
    assert "lab: shy-cat waits in the queue: `dvc queue start` lets it begin" in queued
    unknown = pipeline.python("lab.cli", "watch", "shy-dog", exits=1)
    assert "lab: shy-dog is no run that was seen here" in unknown


@pytest.mark.slow
def test_what_a_stage_tells_never_makes_it_run_again(pipeline, tmp_path):
    (tmp_path / "gate").touch()
    pipeline.dvc("repro")
    assert (pipeline.root / live.FOLDER / "workspace/two.jsonl").is_file()
    assert "up to date" in pipeline.dvc("status")
    (pipeline.root / live.FOLDER / "workspace/two.jsonl").write_text("")
    assert "up to date" in pipeline.dvc("status")
