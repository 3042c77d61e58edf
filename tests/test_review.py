"""lab review: gates, the noise of test prompts, what is out of date; on a fresh clone, without a model."""

import json
import os
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT, Project

from lab.review import command, page
from lab.review.changes import Metric
from lab.review.gates import verdict
from lab.review.intervals import intervals
from lab.review.page import cell
from lab.review.revisions import Revision
from stages.errors import UserError
from stages.settings import Gate


def prompts(right: list[int]) -> list[dict]:
    """Test prompts, one fact each, answered rightly or not."""
    return [
        {
            "kind": "recall",
            "question": f"question {number}",
            "reference": f"fact {number}",
            "parity": {"identical": True},
            "scores": {
                model: {
                    "exact_match": match,
                    "rouge_l": 0.5,
                    "chrf": 50,
                    "negative_log_likelihood": 2.0,
                    "tokens": 4,
                    "ended": 1,
                    "repetition_rate": 0.0,
                }
                for model in ("adapter", "base")
            },
        }
        for number, match in enumerate(right)
    ]


def test_the_same_answers_leave_no_doubt():
    same = prompts([1, 0] * 20)
    assert intervals(same, same)["recall_exact_match"] == (0, 0)


def test_one_more_right_answer_could_be_noise_and_twenty_could_not():
    before = prompts([0] * 40)
    low, _ = intervals(before, prompts([1] + [0] * 39))["recall_exact_match"]
    assert low == 0
    low, high = intervals(before, prompts([1] * 20 + [0] * 20))["recall_exact_match"]
    assert 0.3 < low < 0.5 < high < 0.7


def test_without_prompts_no_interval_is_claimed():
    assert intervals([], prompts([1])) == {}
    assert Metric("recall_exact_match", 0.5, 0.9).verdict == "better"


@pytest.mark.parametrize(
    ("gate", "before", "after", "interval", "passed"),
    [
        (Gate(minimum=0.8), None, 0.8, None, True),
        (Gate(minimum=0.8), None, 0.79, None, False),
        (Gate(maximum=150), None, 151, None, False),
        (Gate(regression=0.02), 0.9, 0.89, (-0.02, -0.001), True),
        (Gate(regression=0.02), 0.9, 0.8, (-0.15, -0.05), False),
        (Gate(regression=0.02), 0.9, 0.8, (-0.25, 0.05), True),  # noise could explain it
        (Gate(regression=0.02), 0.9, 0.8, None, False),
        (Gate(regression=0.02), 0.8, 0.9, (0.05, 0.15), True),
        (Gate(minimum=0.8), 0.9, None, None, False),
    ],
)
def test_a_gate_fails_for_what_noise_cannot_explain(gate, before, after, interval, passed):
    assert verdict("recall_exact_match", gate, before, after, interval).passed is passed


def test_less_is_better_for_a_perplexity():
    gate = Gate(regression=0.2)
    assert verdict("answer_perplexity", gate, 4.0, 3.0, (-1.2, -0.8)).passed
    assert not verdict("answer_perplexity", gate, 4.0, 4.5, (0.3, 0.7)).passed


def test_an_answer_stays_text_inside_its_table():
    shown = cell("a | b <script> @somebody https://x `c`\n# d")
    assert not set("|<`#\n") & set(shown.replace("&#", ""))
    assert "@somebody" not in shown
    assert "https://" not in shown


def test_a_page_makes_its_folder_and_says_where_it_cannot_be_written(tmp_path):
    command.write(tmp_path / "new/page.html", "page")
    assert (tmp_path / "new/page.html").read_text() == "page"
    for file in (tmp_path, tmp_path / "new/page.html/page.html"):
        with pytest.raises(UserError, match=r"^--html .*: give another file$"):
            command.write(file, "page")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no dvc.lock here"), ("<<<<<<< HEAD\na: 1\n", "unreadable"), ("", "unreadable")],
)
def test_without_a_dvc_lock_there_is_one_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "dvc.lock").write_text(text)
    with pytest.raises(UserError, match=message):
        command.inputs()


def test_a_review_that_cannot_start_leaves_its_error_on_the_page(tmp_path):
    """The step of the workflow, with a `lab` that only fails: its page becomes the comment."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/review.yml").read_text())
    (step,) = [s for s in workflow["jobs"]["review"]["steps"] if s.get("name") == "lab review"]
    lab = tmp_path / ".venv/bin/lab"
    lab.parent.mkdir(parents=True)
    lab.write_text("#!/bin/sh\necho 'lab: params.yaml: seed is missing' >&2\nexit 1\n")
    lab.chmod(0o755)
    environment = {**os.environ, "BASE": "main", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    done = subprocess.run(
        ["bash", "-e", "-c", step["run"]],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "seed is missing" in done.stderr
    page = (tmp_path / "build/review/review.md").read_text()
    assert page.startswith("# Review")
    assert "lab: params.yaml: seed is missing" in page
    assert (tmp_path / "summary").read_text() == page


@pytest.mark.slow
def test_the_page_says_what_changed_and_needs_no_network(changed, tmp_path):
    page = tmp_path / "review.html"
    text = changed.python("lab.cli", "review", "HEAD~1", "--html", str(page))
    assert "| `evaluate.max_new_tokens` | 8 | 6 |" in text
    assert "| evaluate | yes |" in text
    assert "| finetune |  |" in text
    html = page.read_text()
    assert html.count("vegaEmbed(") == 3
    assert 'src="http' not in html
    assert "<link" not in html


@pytest.mark.slow
def test_metrics_diff_of_one_parameter_fits_a_terminal(changed):
    lines = changed.dvc("metrics", "diff", "HEAD~1").splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 40


@pytest.mark.slow
def test_a_clone_without_models_is_reviewed_and_an_edited_stage_fails_it(changed, tmp_path):
    for folder in ("models", "data/prepared", "metrics/raw", "metrics/speed", ".dvc/cache"):
        shutil.rmtree(changed.root / folder)
    changed.python("lab.cli", "review", "HEAD~1")
    changed.replace("stages/finetune.py", '"""Train a LoRA', '"""Fit a LoRA')
    text = changed.python("lab.cli", "review", "HEAD~1", exits=1)
    assert "**Stage finetune is out of date**: stages/finetune.py changed" in text


@pytest.mark.slow
def test_a_failing_gate_ends_with_exit_code_1(changed):
    gate = "    recall_exact_match: {minimum: 1.0}\n  prompts: 3"
    changed.replace("conf/experiment/shrunk.yaml", "  prompts: 3", f"  gates:\n{gate}")
    changed.dvc("repro")
    text = changed.python("lab.cli", "review", "HEAD", exits=1)
    assert "❌ **Gate recall_exact_match fails**: " in text


def test_a_shallow_clone_is_told_how_to_get_what_to_compare_with(changed, tmp_path):
    shallow = Project(tmp_path / "shallow")
    changed.git("clone", "--quiet", "--depth", "1", f"file://{changed.root}", str(shallow.root))
    said = shallow.python("lab.cli", "review", exits=1)
    assert "this clone is shallow, `git fetch --unshallow` brings the commits before" in said
    shallow.git("fetch", "--quiet", "--unshallow")
    assert "evaluate.max_new_tokens" in shallow.python("lab.cli", "review")


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Project:
    """A git repository with one commit to compare with, whose files a test writes before."""
    project = Project(tmp_path / "repository")
    (project.root / "metrics").mkdir(parents=True)
    project.git("init", "--quiet")
    monkeypatch.chdir(project.root)
    return project


CONFLICT = '<<<<<<< HEAD\n{"a": 1}\n=======\n{"a": 2}\n>>>>>>> theirs\n'


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("dvc.lock", lambda revision: revision.lock),
        ("params.yaml", lambda revision: revision.params),
        ("metrics/quality.json", lambda revision: revision.metrics),
        ("metrics/costs.json", lambda revision: revision.machines),
        ("metrics/predictions.jsonl", lambda revision: revision.prompts),
        ("metrics/tradeoff.json", lambda revision: revision.table("metrics/tradeoff.json")),
    ],
)
@pytest.mark.parametrize("where", ["HEAD", "workspace"])
def test_a_file_with_conflict_marks_is_named_with_its_revision(where, file, read, repository):
    (repository.root / file).write_text(CONFLICT)
    repository.commit()
    with pytest.raises(UserError, match=f"{file} .*cannot be read") as error:
        read(Revision(where))
    assert "\n" not in str(error.value)


def test_an_answer_may_hold_any_line_separator(repository):
    rows = [{"adapter": "one\u2028two\x85three"}, {"adapter": "four"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (repository.root / "metrics/predictions.jsonl").write_text(text, encoding="utf-8", newline="\n")
    repository.commit()
    assert Revision("HEAD").prompts == Revision("workspace").prompts == rows


@pytest.mark.parametrize(
    ("before", "after", "warned"),
    [("EPYC, 2 cores", "EPYC, 2 cores", False), ("EPYC, 2 cores", "Xeon, 8 cores", True)],
)
def test_two_machines_are_named_and_warned_of(before, after, warned, repository):
    costs = repository.root / "metrics/costs.json"
    costs.write_text(json.dumps({"finetune": {"seconds": 1, "machine": before}}))
    repository.commit()
    costs.write_text(json.dumps({"finetune": {"seconds": 1, "machine": after}}))
    base, head = Revision("HEAD"), Revision("workspace")
    assert (base.machines, head.machines) == ([before], [after])
    found = page.Review(base, head, ("one", "two"), [], [], [], [], [], [], [], 0, 0, True)
    text = page.markdown(found)
    assert f"on {before}" in text
    assert f"on {after}" in text
    assert ("different machines" in text) == warned
