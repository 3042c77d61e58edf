"""What a job gets is what it needs: a file that stays at home is said, or refused before a node is paid."""

from __future__ import annotations

import os

import pytest

from lab.azureml import snapshot
from stages.core.errors import UserError

pytestmark = pytest.mark.slow  # git and Azure's SDK, seconds each


@pytest.fixture
def here(fresh, monkeypatch):
    monkeypatch.chdir(fresh.root)
    return fresh


def ignore(project, pattern: str) -> None:
    with (project.root / ".amlignore").open("a") as file:
        file.write(f"{pattern}\n")


def test_the_ignore_file_that_comes_with_the_repository_keeps_nothing_needed_back(here, capsys):
    snapshot.check_ignored([])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("*.jsonl", "data/probes/travel.jsonl"),
        ("stages/evaluate.py", "stages/evaluate.py"),
        ("dvc.*", "dvc.lock|dvc.yaml"),
        ("conf/**/tiny.yaml", "conf/model/tiny.yaml"),
    ],
)
def test_a_pattern_that_holds_back_what_the_job_needs_is_refused(here, pattern, named):
    ignore(here, pattern)
    with pytest.raises(UserError, match=f"[.]amlignore keeps ({named}) back"):
        snapshot.check_ignored([])


def test_another_tracked_file_that_is_held_back_is_said(here, capsys):
    ignore(here, "README.md")
    snapshot.check_ignored([])
    assert "Not sent, .amlignore names them: README.md" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override", ["data.path=mine.jsonl", "model.source.corpus=mine.jsonl"], ids=str
)
def test_a_file_that_git_does_not_know_is_refused(here, override):
    (here.root / "mine.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"mine\.jsonl is not in git, .* git add mine"):
        snapshot.check_ignored([override])


def test_what_a_job_got_is_kept_also_where_files_have_only_a_new_date(here):
    os.utime(here.root / "README.md", (0, 0))
    commit = snapshot.remember("first")
    assert here.git("rev-parse", "refs/lab/first").strip() == commit
    (here.root / "README.md").write_text("edited")
    assert snapshot.remember("second") == commit
    assert here.git("show", "refs/lab/second:README.md") == "edited"
