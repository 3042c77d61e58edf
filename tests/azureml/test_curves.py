"""A job's curves: the node sends what its stages tell, the studio has them, `lab watch` shows them."""

from __future__ import annotations

import threading

import pytest
from typer.testing import CliRunner

from lab.azureml import curves, workspace
from lab.cli import app
from lab.watch import command
from stages.core import live
from support.processes import wait_until

from .service import HOME, JOB_TOKEN, MLFLOW, TRACKING

pytestmark = [pytest.mark.azure, pytest.mark.slow]
JOB = "calm-heron-0a1b"
LOOP = {"of": 20, "what": "training", "unit": "step"}


@pytest.fixture
def node(network, tmp_path, monkeypatch):
    """A node that runs a job: this process, in a folder with a run that tells."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "MLFLOW_TRACKING_URI": TRACKING,
        "MLFLOW_TRACKING_TOKEN": JOB_TOKEN,
        "MLFLOW_RUN_ID": JOB,
        live.FILE: "",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "DVC_STAGE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.setattr(curves, "PAUSE", 0.05)
    network.service.details[JOB] = {"runId": JOB, "status": "Running", "logFiles": {}}
    network.service.put(
        f"{HOME}/jobs/{JOB}",
        {
            "jobType": "Command",
            "command": "true",
            "experimentName": "olive-lab",
            "status": "Running",
            "services": {},
            "environmentId": f"{HOME}/environments/e/versions/1",
        },
    )
    return network


def train(steps=(5, 10), **more):
    with live.told("finetune") as ends:
        for step in steps:
            live.tell(done=step, **LOOP, loss=10.0 / step, learning_rate=0.001, **more)
        ends("models/adapter")


def sent(cloud) -> dict[str, list[tuple[int, float]]]:
    """Return the curves that the workspace has of the job."""
    found: dict = {}
    for metric in cloud.service.metrics.get(JOB, []):
        found.setdefault(metric["key"], []).append((metric["step"], metric["value"]))
    return found


def test_what_the_stages_tell_is_in_the_studio_while_the_job_runs(node):
    with curves.sent():
        with live.told("quantize"):
            list(live.steps(range(3), "the model's own text (x)", "batch"))
        train()
        wait_until(lambda: "loss" in sent(node))
    assert sent(node)["loss"] == [(5, 2.0), (10, 1.0)]
    assert sent(node)["finetune.training"] == [(5, 25.0), (10, 50.0)]
    assert sent(node)["quantize.the models own text x"][-1] == (3, 100.0)


def test_outside_of_a_job_nothing_is_sent(node, monkeypatch):
    monkeypatch.delenv("MLFLOW_RUN_ID")
    with curves.sent():
        train()
    assert sent(node) == {}


def test_when_the_jobs_token_has_expired_the_nodes_identity_goes_on(node):
    node.service.job_token = None
    with curves.sent():
        train()
    assert len(sent(node)["loss"]) == 2


def test_a_workspace_that_does_not_answer_is_one_line_and_is_caught_up_with(node, capsys):
    node.service.refusals[f"POST {MLFLOW}/*"] = (500, {})
    studio = curves.Studio.of_node()
    sender = curves.Sender(studio, JOB)
    train()
    sender.send()
    sender.send()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("job: the studio's Metrics tab lacks the curves: HTTP Error 500")
    node.service.refusals.clear()
    sender.send()
    assert len(sent(node)["loss"]) == 2


def test_a_job_is_followed_by_its_name_to_its_end(node, monkeypatch):
    monkeypatch.setattr(command, "PATIENCE", 0.05)
    monkeypatch.setattr("lab.experiments.request.taken_names", dict)
    with curves.sent():
        train()
    job = node.service.resource_of(f"jobs/{JOB}")["properties"]
    asked = lambda: [path for _, path in node.service.calls if path.endswith("get-history")]  # noqa: E731

    def end() -> None:
        wait_until(asked)
        job["status"] = "Completed"

    ending = threading.Thread(target=end)
    ending.start()
    for folder in live.FOLDER.glob("*/*"):  # the laptop has nothing of it
        folder.unlink()
    done = CliRunner().invoke(app, ["watch", JOB])
    ending.join()
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [
        "finetune: training 5 of 20, 25 %, loss 2, lr 0.001",
        "finetune: training 10 of 20, 50 %, loss 1, lr 0.001"
        + done.output.splitlines()[1].partition("lr 0.001")[2],
        f"{JOB}: Completed, lab jobs --restore {JOB} brings its results",
    ]
    assert len(asked()) == 3  # of each curve, once: nothing was new at the second look


def test_a_job_that_is_not_there_is_one_line(node, monkeypatch):
    monkeypatch.setattr("lab.experiments.request.taken_names", dict)
    done = CliRunner().invoke(app, ["watch", "nobody"])
    assert "no job nobody: lab jobs lists them" in str(done.exception)


def test_the_workspace_says_where_its_metrics_are(node):
    client = workspace.need().connect()
    studio = curves.Studio.of_workspace(client)
    assert studio.address == "https://" + TRACKING.removeprefix("azureml://")
