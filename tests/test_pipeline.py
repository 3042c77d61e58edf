"""The pipeline through real DVC, on the tiny model: what runs when, and what is left when it stops."""

import json
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from stages.core.machine import machine
from stages.sources import random_model
from support.processes import wait_until
from support.project import ROOT, Project, clone, left_behind, stages_that_ran

pytestmark = pytest.mark.slow

ALL = ["fetch", "prepare", "quantize", "finetune", "optimize", "adapt", "evaluate", "report"]
OUTPUTS = [
    "models/base/model.safetensors",
    "models/base/tokenizer.json",
    "data/prepared/train.jsonl",
    "data/prepared/validation.jsonl",
    "data/prepared/test.jsonl",
    "data/prepared/calibration.jsonl",
    "models/quantized/model.safetensors",
    "models/adapter/adapter_model.safetensors",
    "models/onnx/model.onnx",
    "models/onnx/lora.onnx",
    "models/onnx/genai_config.json",
    "models/onnx_adapter/adapter.onnx_adapter",
    "metrics/raw/quantize.json",
    "metrics/raw/finetune.json",
    "metrics/raw/evaluate.json",
    "metrics/raw/predictions.jsonl",
    "metrics/quality.json",
    "metrics/quality.md",
    "metrics/size.json",
    "metrics/speed.json",
    "metrics/costs.json",
    "metrics/plots/loss.csv",
    "metrics/plots/scores.csv",
    "metrics/plots/tradeoff.json",
    "metrics/predictions.md",
    "metrics/predictions.jsonl",
]
TINY_PHI3 = {
    "model_type": "phi3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def params(project: Project) -> dict:
    return yaml.safe_load((project.root / "params.yaml").read_text())


def params_of_experiment(project: Project, name: str) -> dict:
    refs = project.git("for-each-ref", "--format=%(refname)", "refs/exps").split()
    (ref,) = [ref for ref in refs if ref.endswith(f"/{name}")]
    return yaml.safe_load(project.git("show", f"{ref}:params.yaml"))


def read_config(project: Project) -> dict:
    return json.loads((project.root / "models/quantized/config.json").read_text())


def in_order(stages: list[str]) -> list[str]:
    return sorted(stages, key=["params", *ALL].index)


def test_a_full_run_runs_every_stage_and_makes_every_output(finished):
    log = finished.log.read_text()
    assert in_order(stages_that_ran(log)) == ["params", *ALL]
    assert [name for name in OUTPUTS if not (finished.root / name).is_file()] == []
    assert left_behind(finished) == []
    costs = json.loads((finished.root / "metrics/costs.json").read_text())
    assert [stage for stage in ALL[:-1] if costs[stage]["peak_memory_gib"] <= 0] == []
    assert {costs[stage]["machine"] for stage in ALL[:-1]} == {machine()}


def test_another_path_commit_and_user_give_the_same_dvc_lock(finished, tmp_path):
    """All but what was timed: no output may hold where, when or by whom it was made."""
    other = clone(tmp_path / "a longer path" / "to a clone")
    other.git("commit", "--quiet", "--allow-empty", "--message", "another commit")
    other.dvc("repro")
    one, two = (hashes(project) for project in (finished, other))
    timed = {name for name in one if name.startswith("metrics/speed")}
    assert timed
    assert {n for n in one if one[n] != two.get(n)} - timed - UNCACHED_AND_TIMED == set()


# what report makes of the timed outputs
UNCACHED_AND_TIMED = {"metrics/speed.json", "metrics/costs.json", "metrics/plots/tradeoff.json"}


def hashes(project: Project) -> dict[str, str]:
    """Return the hash of every output and dependency that dvc.lock names."""
    stages = yaml.safe_load((project.root / "dvc.lock").read_text())["stages"].values()
    entries = [entry for stage in stages for entry in stage.get("deps", []) + stage["outs"]]
    return {entry["path"]: entry["md5"] for entry in entries}


def test_every_stage_says_in_its_last_line_what_it_made_and_how_long_it_took(finished):
    log = finished.log.read_text()
    for stage in ALL:
        (line,) = [line for line in log.splitlines() if line.startswith(f"{stage}: ")]
        assert " s, peak memory " in line


def test_dvc_shows_the_metrics_and_the_plot(project):
    shown = json.loads(project.dvc("metrics", "show", "--json"))[""]["data"]
    assert shown["metrics/quality.json"]["data"]["perplexity_quantized"] > 1
    assert shown["metrics/size.json"]["data"]["onnx_mb"] > 0
    assert shown["metrics/speed.json"]["data"]["decode_tokens_per_s_p50"] > 0
    plots = json.loads(project.dvc("plots", "show", "--json"))
    assert "errors" not in plots
    assert [point["revisions"] for point in plots["data"]["loss"]] == [["workspace"]]


def test_a_second_repro_runs_nothing(project):
    assert stages_that_ran(project.dvc("repro")) == []
    assert project.git("status", "--short") == ""


def test_lost_outputs_come_back_from_the_cache_without_running(project):
    project.run("rm", "-r", "models", "data/prepared", "metrics/raw", "metrics/speed")
    assert stages_that_ran(project.dvc("repro")) == []
    assert [name for name in OUTPUTS if not (project.root / name).is_file()] == []


def test_more_training_runs_exactly_what_depends_on_it(project):
    before = params(project)
    output = project.dvc("exp", "run", "-S", "finetune.max_steps=3")
    assert "Running stage 'params'" not in output
    assert in_order(stages_that_ran(output)) == ["finetune", "adapt", "evaluate", "report"]
    before["finetune"]["max_steps"] = 3
    assert params(project) == before


def test_an_edit_of_conf_is_taken_up_by_the_next_repro(two_commits, changed):
    output = two_commits.log.read_text()
    assert "evaluate.max_new_tokens: 8 -> 6" in output
    assert stages_that_ran(output) == ["params", "evaluate", "report"]
    assert stages_that_ran(changed.dvc("repro")) == []


def test_a_comment_in_conf_reruns_nothing_but_the_guard(project):
    with (project.root / "conf/finetune/lora.yaml").open("a") as file:
        file.write("# a remark\n")
    assert stages_that_ran(project.dvc("repro")) == ["params"]


def test_an_applied_override_survives_an_edit_of_the_schema(tried):
    tried.dvc("exp", "apply", "shorter")
    with (tried.root / "stages/core/settings.py").open("a") as file:
        file.write("# a remark\n")
    assert stages_that_ran(tried.dvc("repro")) == ["params"]
    assert params(tried)["evaluate"]["max_new_tokens"] == 6
    assert "evaluate.max_new_tokens: 6 -> 8" in tried.python("stages.params", "--strict", exits=1)


def test_another_model_and_method_in_a_queued_experiment(project, tmp_path):
    folder = tmp_path / "phi3"
    random_model.make(TINY_PHI3, 400, project.root / "data/travel.jsonl", folder)
    group = ["-S", "model=local", "-S", f"model.source.path={folder}", "-S", "model.group_size=32"]
    project.dvc("exp", "run", "--queue", "--name", "phi", *group, "-S", "quantize=rtn", "optimize")
    project.dvc("exp", "run", "--run-all")
    queued = params_of_experiment(project, "phi")
    assert (queued["model"]["name"], queued["quantize"]["method"]) == ("local", "rtn")
    assert project.git("status", "--short") == ""
    project.dvc("exp", "apply", "phi")
    assert read_config(project)["model_type"] == "phi3"


def test_an_experiment_in_a_temporary_copy_leaves_the_workspace_alone(with_experiment):
    assert stages_that_ran(with_experiment.log.read_text()) == ["evaluate", "report"]
    assert with_experiment.git("status", "--short") == ""
    tried = params_of_experiment(with_experiment, "shorter")
    assert tried["evaluate"]["max_new_tokens"] == 6


def test_a_broken_row_stops_prepare_with_its_line_and_leaves_no_result(project):
    data = project.root / "data/travel.jsonl"
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:6], '{"prompt": "half a r', *lines[7:]]) + "\n")
    output = project.dvc("repro", "prepare", exits=255)
    errors = [line for line in output.splitlines() if line.startswith("prepare: ")]
    assert len(errors) == 1
    assert errors[0].startswith("prepare: data/travel.jsonl:7: is not JSON")
    assert "Traceback" not in output
    assert not (project.root / "data/prepared").exists()
    assert left_behind(project) == []


def test_an_impossible_setting_stops_before_any_work(project):
    output = project.dvc("exp", "run", "-S", "finetune.rank=0", exits=255)
    assert "finetune.rank is 0: must be greater than 0" in output
    assert project.git("status", "--short") == ""
    assert stages_that_ran(output) == []


def test_a_group_size_that_does_not_divide_stops_quantize(project):
    output = project.dvc("exp", "run", "-S", "quantize.group_size=128", exits=255)
    assert (
        "quantize.group_size is 128: does not divide model.layers.0.self_attn.q_proj's input 64: 64 does"
        in output
    )
    assert "Traceback" not in output
    assert not (project.root / "models/quantized").exists()


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/dash"])
def test_killing_dvc_kills_the_stage_and_what_it_started(tmp_path, shell):
    """Dash stays between DVC and the stage, bash does not."""
    project = Project(tmp_path / "project")
    project.root.mkdir()
    (project.root / "dvc.yaml").write_text("stages:\n  wait:\n    cmd: python wait.py\n")
    (project.root / "wait.py").write_text(WAIT)
    project.git("init", "--quiet")
    project.dvc("init", "--quiet")
    process = project.start("env", f"SHELL={shell}", sys.executable, "-m", "dvc", "repro")
    stage, child = wait_until(lambda: numbers_in(project.root / "pids"))
    process.kill()
    process.wait()
    wait_until(lambda: not is_alive(stage) and not is_alive(child))


# A stage that starts a process and never ends.
WAIT = f"""\
import subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from stages.core.parent import die_with_dvc
die_with_dvc()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
import os
open("pids", "w").write(f"{{os.getpid()}} {{child.pid}}\\n")
time.sleep(3600)
"""


def numbers_in(file: Path) -> list[int]:
    """Return the numbers of a one-line file, none before it is whole."""
    text = file.read_text() if file.exists() else ""
    return [int(word) for word in text.split()] if text.endswith("\n") else []


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that nobody has waited for yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
