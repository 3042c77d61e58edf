"""The workflows and the hooks: pinned, without secrets, and their commands run in a clone."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from support.project import ROOT, Project

FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
WORKFLOWS = {file.name: yaml.safe_load(file.read_text()) for file in FILES}
JOBS = [job for workflow in WORKFLOWS.values() for job in workflow["jobs"].values()]
STEPS = [step for job in JOBS for step in job["steps"]]
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
TARGETS = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def with_venv(project: Project) -> Project:
    """Give a clone the .venv that hooks and workflows name: this Python's."""
    folder = project.root / ".venv/bin"
    folder.mkdir(parents=True)
    for name in ("ruff", "lab", "python"):
        script = folder / name
        module = {"ruff": "-m ruff", "lab": "-m lab.cli", "python": ""}[name]
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        script.chmod(0o755)
    return project


def test_every_action_is_pinned_to_a_commit_and_says_of_which_version():
    lines = [line for file in FILES for line in file.read_text().splitlines() if "uses:" in line]
    pinned = r"\s+- uses: [\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+"
    assert lines
    assert [line for line in lines if not re.fullmatch(pinned, line)] == []


def test_an_action_has_the_same_commit_wherever_it_is_used():
    used = {step["uses"] for step in STEPS if "uses" in step}
    assert len(used) == len({name.partition("@")[0] for name in used})


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_secret_is_needed_and_no_code_of_a_pull_request_runs_with_a_right_to_write(name):
    workflow = WORKFLOWS[name]
    assert "secrets." not in (ROOT / ".github/workflows" / name).read_text()
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in workflow[True]  # YAML 1.1 reads the key `on` as true
    for job in workflow["jobs"].values():
        checks_out = any("checkout" in step.get("uses", "") for step in job["steps"])
        assert not (checks_out and "permissions" in job)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_job_runs_for_hours_and_no_workflow_runs_twice_at_once(name):
    assert "group" in WORKFLOWS[name]["concurrency"]
    assert all(job["timeout-minutes"] <= 90 for job in WORKFLOWS[name]["jobs"].values())


def test_every_python_that_the_project_allows_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = WORKFLOWS["ci.yml"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    minors = [int(version.removeprefix("3.")) for version in pythons]
    assert project["requires-python"] == f">=3.{minors[0]},<3.{minors[-1] + 1}"
    assert minors == list(range(minors[0], minors[-1] + 1))


def test_all_tests_run_in_some_workflow_and_every_make_target_exists():
    matrix = WORKFLOWS["ci.yml"]["jobs"]["azure"]["strategy"]["matrix"]["target"]
    run = [step["run"].split()[1] for step in STEPS if step.get("run", "").startswith("make ")]
    called = {target for target in run if "$" not in target} | {*matrix}
    assert {target for target in TARGETS if target.startswith("test")} - {"test-fast"} <= called
    assert called <= {*TARGETS}


def test_no_expression_stands_inside_a_script():
    assert [step["run"] for step in STEPS if "${{" in step.get("run", "")] == []


@pytest.mark.slow
def test_the_review_step_writes_the_pages_and_fails_when_a_gate_does(project, tmp_path):
    (step,) = [step for step in STEPS if step.get("name") == "lab review"]
    with_venv(project)
    summary = tmp_path / "summary.md"
    script = f'export BASE=HEAD GITHUB_STEP_SUMMARY="{summary}"\n{step["run"]}'
    project.run("bash", "-e", "-c", script)
    assert summary.read_text().startswith("# Review")
    assert (project.root / "build/review/review.html").stat().st_size > 100_000
    project.replace("stages/report.py", '"""Collect', '"""Gather')
    project.run("bash", "-e", "-c", script, exits=1)
    assert "Stage report is out of date" in (project.root / "build/review/review.md").read_text()


@pytest.mark.slow
def test_the_weekly_step_passes_where_nothing_runs_and_fails_where_a_stage_does(project):
    (step,) = [step for step in STEPS if step.get("name") == "a second repro runs nothing"]
    assert step["shell"] == "bash"  # GitHub runs it with -eo pipefail
    with_venv(project)
    project.run("bash", "-eo", "pipefail", "-c", step["run"])
    project.replace("stages/report.py", '"""Collect', '"""Gather')
    project.run("bash", "-eo", "pipefail", "-c", step["run"], exits=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "file", "old", "new"),
    [
        ("ruff-check", "lab/models/chat.py", "import sys\n", "import sys\nundefined\n"),
        ("params", "params.yaml", "max_steps: 2", "max_steps: 3"),
        ("dvc-status", "stages/report.py", '"""Collect', '"""Gather'),
    ],
)
def test_a_hook_passes_and_stops_what_it_is_for(project, hook, file, old, new):
    entry = next(h["entry"] for h in HOOKS if h["id"] == hook)
    named = [] if hook in ("params", "dvc-status") else [file]
    with_venv(project)
    project.run(*entry.split(), *named)
    project.replace(file, old, new)
    project.run(*entry.split(), *named, exits=1)


def test_every_hook_runs_from_the_locked_environment():
    assert {Path(hook["entry"].split()[0]).parent for hook in HOOKS} == {Path(".venv/bin")}
    assert {hook["language"] for hook in HOOKS} == {"system"}
