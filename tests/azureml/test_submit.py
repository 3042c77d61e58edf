"""Submitting: a second machine runs what changed, the laptop gets it back, and nobody else hears of it."""

from __future__ import annotations

import json
import re
import sys
import time

import pytest
import yaml

from lab.azureml import sweep
from support.processes import wait_until
from support.project import stages_that_ran

from .cloud import REMOTE
from .conftest import files_of
from .service import HOME

pytestmark = [pytest.mark.azure, pytest.mark.slow]

RETRAINED = ["finetune", "adapt", "evaluate", "report"]
SECRETS = {
    ".dvc/config.local": "['remote \"other\"']\n    url = azure://x\n    account_key = hush-hush\n",
    ".env": "TOKEN=hush-hush",
    ".env.production": "TOKEN=hush-hush",
    "config.json": '{"subscription_id": "hush-hush"}',
    ".azureml/config.json": '{"subscription_id": "hush-hush"}',
    "server.pem": "hush-hush",
    "deep/down/id_rsa": "hush-hush",
}


def log_of(cloud, job: str) -> str:
    return cloud.datastore.download_blob(f"logs/{job}/user_logs/std_log.txt").readall().decode()


def submitted(output: str) -> list[str]:
    return re.findall(r"^Submitted (\S+)", output, re.MULTILINE)


def contents(cloud, uri: str, folder) -> dict[str, bytes]:
    """Return the files that a container holds, by path."""
    cloud.download(uri, folder)
    return files_of(folder)


@pytest.fixture
def replaced(cloud, monkeypatch):
    """Let the jobs whose command has certain words in it run another command."""

    def replace(words: str, command: str) -> None:
        begin = cloud.machines.begin
        other = {"command": command}
        monkeypatch.setattr(
            cloud.machines,
            "begin",
            lambda job, home: begin(job | other if words in job["command"] else job, home),
        )

    return replace


@pytest.mark.longest
def test_from_an_edit_on_the_laptop_to_a_registered_model(laptop, cloud, tmp_path):
    old = (laptop.root / "models/adapter/adapter_model.safetensors").read_bytes()
    laptop.replace("conf/experiment/shrunk.yaml", "max_steps: 2", "max_steps: 3")

    output = laptop.lab("submit")
    (job,) = submitted(output)
    assert stages_that_ran(log_of(cloud, job)) == ["params", *RETRAINED]
    assert {"loss", "finetune.training"} <= {metric["key"] for metric in cloud.service.metrics[job]}
    assert "Completed" in laptop.lab("watch", job).splitlines()[-1]
    assert stages_that_ran(output.partition("Execution Summary")[2]) == []

    params = yaml.safe_load((laptop.root / "params.yaml").read_text())
    assert params["finetune"]["max_steps"] == 3
    assert stages_that_ran(laptop.dvc("repro")) == []
    assert (laptop.root / "models/adapter/adapter_model.safetensors").read_bytes() != old

    laptop.commit()
    assert "version 1" in laptop.lab("register")
    assert "nothing to do" in laptop.lab("register")
    got = tmp_path / "got"
    assert "lab chat --model" in laptop.lab("download", "ft-for-travel", "--to", str(got))
    for folder in ("onnx", "onnx_adapter"):
        assert files_of(got / folder) == files_of(laptop.root / "models" / folder)
    adapter = f"travel={got}/onnx_adapter/adapter.onnx_adapter"
    laptop.lab("chat", "--model", f"{got}/onnx", "--adapter", adapter, "where is Chicago")
    assert "exists already" in laptop.lab("download", "ft-for-travel", "--to", str(got), exits=1)
    assert "registered are 1 (" in laptop.lab("download", "ft-for-travel:7", exits=1)
    (line,) = laptop.lab("jobs").splitlines()
    assert line.split()[:2] == [job, "Completed"]
    assert "=" in line
    assert cloud.relay.reached >= {"management.azure.com", "login.microsoftonline.com"}


@pytest.mark.longest
def test_a_sweep_computes_once_what_its_jobs_share_and_brings_back_those_that_did_not_fail(
    laptop, cloud, replaced
):
    replaced("tokens=5", "exit 1")
    shared, varied = "finetune.max_steps=3", "evaluate.max_new_tokens=5,6,7"
    output = laptop.lab("submit", "-S", shared, "--sweep", varied, exits=1)
    common, failed, *jobs = submitted(output)
    assert stages_that_ran(log_of(cloud, common)) == ["finetune", "adapt"]
    for job in jobs:
        assert stages_that_ran(log_of(cloud, job)) == ["evaluate", "report"]
        assert f"Restored without computing: {job}" in output
    assert output.splitlines()[-1].startswith(f"lab: {failed} failed: its log")
    shown = json.loads(laptop.dvc("exp", "show", "--json"))
    names = {found["name"] for rev in shown for found in (rev.get("experiments") or [])}
    assert names == set(jobs)
    assert laptop.git("status", "--porcelain") == ""
    laptop.lab("jobs", "--restore", jobs[1])
    params = yaml.safe_load((laptop.root / "params.yaml").read_text())
    assert params["evaluate"]["max_new_tokens"] == 7
    assert stages_that_ran(laptop.dvc("repro", "--pull", "--allow-missing")) == []


def test_jobs_that_train_differently_share_what_does_not_read_the_adapter(fresh, monkeypatch):
    monkeypatch.chdir(fresh.root)
    shared = sweep.common_work([["finetune.rank=2"], ["finetune.rank=4"]])
    assert sorted(shared) == ["fetch", "optimize", "prepare", "quantize"]


@pytest.mark.longest
def test_a_laptop_without_models_submits_and_restores_later(laptop, cloud):
    laptop.dvc("push", "--run-cache")
    laptop.run("rm", "-r", ".dvc/cache", "models", "data/prepared", "metrics/raw")
    cloud.machines.free.clear()
    output = laptop.lab("submit", "--detach", "-S", "evaluate.max_new_tokens=6")
    (job,) = submitted(output)
    assert f"job {job} is " in laptop.lab("jobs", "--restore", job, exits=1)
    cloud.machines.wait()
    quality = (laptop.root / "metrics/quality.json").read_text()
    (laptop.root / "metrics/quality.json").write_text("computed here meanwhile")
    assert "metrics/quality.json changed here" in laptop.lab("jobs", "--restore", job, exits=1)
    (laptop.root / "metrics/quality.json").write_text(quality)
    assert "Restored without computing" in laptop.lab("jobs", "--restore", job)
    assert not (laptop.root / "models").exists()
    assert stages_that_ran(laptop.dvc("repro", "--pull", "--allow-missing")) == []


@pytest.mark.longest
def test_a_network_that_is_lost_loses_no_job_and_a_retry_brings_all_of_it(laptop, cloud):
    cloud.machines.free.clear()
    process = laptop.start(
        sys.executable, "-m", "lab.cli", "submit", "-S", "evaluate.max_new_tokens=6"
    )
    while process.poll() is None and not any(
        path.endswith("/details") for _, path in cloud.service.calls
    ):
        time.sleep(0.1)
    cloud.relay.cut()
    output, _ = process.communicate(timeout=600)
    (job,) = submitted(output)
    assert f"the job is still running: lab jobs --restore {job}" in output.splitlines()[-1]

    cloud.relay.mend()
    cloud.machines.wait()
    cloud.relay.cut(f"{REMOTE}.blob.core.windows.net")
    assert f"lab jobs --restore {job} tries again" in laptop.lab("jobs", "--restore", job, exits=1)
    cloud.relay.mend()
    assert "Restored without computing" in laptop.lab("jobs", "--restore", job)
    assert stages_that_ran(laptop.dvc("repro")) == []


def test_a_failed_job_ends_in_one_line_and_changes_nothing(laptop, cloud):
    data = laptop.root / "data/travel.jsonl"
    data.write_text(data.read_text() + '{"prompt": "half a r\n')
    output = laptop.lab("submit", exits=1)
    assert "prepare: data/travel.jsonl:" in output
    assert "failed: its log" in output.splitlines()[-1]
    assert laptop.git("status", "--porcelain").split() == ["M", "data/travel.jsonl"]


def test_a_job_gets_what_git_tracks_and_our_lock_and_no_secret_cache_or_model(
    laptop, cloud, replaced, tmp_path
):
    for name, text in SECRETS.items():
        (laptop.root / name).parent.mkdir(parents=True, exist_ok=True)
        (laptop.root / name).write_text(text)
    laptop.git("add", "--force", ".env", "server.pem", "deep/down/id_rsa")
    replaced("", "true")
    laptop.lab("submit", "--detach")
    (job,) = cloud.service.children(f"{HOME}/jobs")
    found = contents(cloud, cloud.machines.code_of(job["properties"]), tmp_path / "snapshot")
    tracked = set(laptop.git("ls-files").split())
    left_out = ("tests/", "benchmarks/", "docs/", "azurite/")
    assert found.keys() == {
        name for name in tracked - SECRETS.keys() if not name.startswith(left_out)
    }
    assert not [name for name, data in found.items() if b"hush-hush" in data]
    assert all(len(data) < 1e6 for data in found.values())

    assert job["properties"]["identity"]["identityType"] == "Managed"
    assert "hush-hush" not in json.dumps(job["properties"])
    (environment,) = cloud.service.children(
        f"{HOME}/environments/CliV2AnonymousEnvironment/versions"
    )
    uri = environment["properties"]["build"]["contextUri"]
    context = contents(cloud, uri, tmp_path / "context")
    assert context == {
        "Dockerfile": (laptop.root / "lab/azureml/Dockerfile").read_bytes(),
        "cuda.txt": (laptop.root / "requirements/cuda.txt").read_bytes(),
        "azure.txt": (laptop.root / "requirements/azure.txt").read_bytes(),
    }


def test_amlignore_alone_keeps_secrets_caches_and_models_back(laptop):
    from azure.ai.ml._utils._asset_utils import get_ignore_file, get_upload_files_from_folder

    for name, text in SECRETS.items():
        (laptop.root / name).parent.mkdir(parents=True, exist_ok=True)
        (laptop.root / name).write_text(text)
    paths = get_upload_files_from_folder(laptop.root, ignore_file=get_ignore_file(laptop.root))
    found = {path.removeprefix(f"{laptop.root}/") for path, _ in paths}
    tracked = set(laptop.git("ls-files").split())
    assert found <= tracked
    assert {"dvc.yaml", "dvc.lock", "stages/finetune.py", ".dvc/config"} <= found


@pytest.mark.longest
def test_a_job_that_is_canceled_half_way_leaves_what_it_finished_to_the_next(laptop, cloud):
    laptop.replace("conf/experiment/shrunk.yaml", "prompts: 3", "prompts: 2")
    with (laptop.root / "stages/adapt.py").open("a") as code:
        code.write("# edited\n")
    (job,) = submitted(laptop.lab("submit", "--detach"))
    wait_until(lambda: "Running stage 'evaluate'" in log_of(cloud, job))
    assert "is being canceled" in laptop.lab("cancel", job)
    cloud.machines.wait()
    assert "Canceled" in laptop.lab("jobs")
    assert "nothing to cancel" in laptop.lab("cancel", job, exits=1)
    (following,) = submitted(laptop.lab("submit"))
    assert stages_that_ran(log_of(cloud, following)) == ["params", "evaluate", "report"]
