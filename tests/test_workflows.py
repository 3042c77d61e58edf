"""The workflow and the hooks: pinned, without secrets, and their commands run in a clone."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Project

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/review.yml").read_text())
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]


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


def test_every_action_is_pinned_to_a_commit():
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", name)] == []


def test_no_secret_is_needed_and_no_code_of_a_pull_request_runs_with_a_right_to_write():
    text = (ROOT / ".github/workflows/review.yml").read_text()
    assert "secrets." not in text
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for job in WORKFLOW["jobs"].values():
        checks_out = any("checkout" in step.get("uses", "") for step in job["steps"])
        assert not (checks_out and "permissions" in job)


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
