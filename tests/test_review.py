"""lab review: gates, the noise of test prompts, what is out of date; on a fresh clone, without a model."""

import json
import os
import shutil
import subprocess
from dataclasses import replace

import pytest
import yaml

from lab.registry import register
from lab.review import charts, command
from lab.review.changes import Metric, Stage, machines_of
from lab.review.gates import verdict
from lab.review.intervals import in_both, intervals
from lab.review.page import cell, in_words
from lab.review.revisions import WORKSPACE, Revision, changed_files, describe, find_base
from lab.review.seeds import Doubt
from stages.core.errors import UserError
from stages.core.settings import Gate
from stages.scoring.predictions import as_jsonl
from support.predictions import predictions
from support.project import ROOT, Project


def test_the_same_answers_tell_a_small_change_from_none_only_as_far_as_their_number_goes():
    same = predictions([1, 0] * 20)
    low, high = intervals(same, same)["recall_exact_match"]
    assert -0.1 < low < 0 < high < 0.1
    assert intervals(same, same)["rouge_l"] == (0, 0)


def test_one_more_right_answer_could_be_noise_and_twenty_could_not():
    before = predictions([0] * 40)
    low, _ = intervals(before, predictions([1] + [0] * 39))["recall_exact_match"]
    assert low < 0
    low, high = intervals(before, predictions([1] * 20 + [0] * 20))["recall_exact_match"]
    assert 0.3 < low < 0.5 < high < 0.7


def test_other_prompts_are_compared_by_the_interval_of_each():
    before, after = predictions([1] * 40), predictions([1] * 41)
    low, high = intervals(before, after)["recall_exact_match"]
    assert -0.1 < low < 0 < high < 0.1
    assert in_both(before, after) == 40


def test_without_prompts_no_interval_is_claimed():
    assert intervals([], predictions([1])) == {}
    assert Metric("recall_exact_match", 0.5, 0.9).verdict == "better"


@pytest.mark.parametrize(
    ("gate", "before", "after", "interval", "seeds", "passed"),
    [
        (Gate(minimum=0.8), None, 0.8, None, None, True),
        (Gate(minimum=0.8), None, 0.79, None, None, False),
        (Gate(maximum=150), None, 151, None, None, False),
        (Gate(regression=0.02), 0.9, 0.89, (-0.02, -0.001), None, True),
        (Gate(regression=0.02), 0.9, 0.8, (-0.15, -0.05), None, False),
        (Gate(regression=0.02), 0.9, 0.8, (-0.15, -0.05), 0.05, False),
        (Gate(regression=0.02), 0.9, 0.8, (-0.25, 0.05), 0.0, True),  # prompts could explain it
        (Gate(regression=0.02), 0.9, 0.8, (-0.15, -0.05), 0.2, True),  # seeds could
        (Gate(regression=0.02), 0.9, 0.8, (-0.19, -0.01), 0.09, True),  # only both together could
        (Gate(regression=0.02), 0.9, 0.8, None, 0.2, True),  # no prompts, but seeds could
        (Gate(regression=0.02), 0.9, 0.8, None, None, False),
        (Gate(regression=0.02), 0.8, 0.9, (0.05, 0.15), 0.0, True),
        (Gate(minimum=0.8), 0.9, None, None, None, False),
    ],
)
def test_a_gate_fails_for_what_noise_cannot_explain(gate, before, after, interval, seeds, passed):
    doubt = Doubt((after or 0) - (before or 0), interval, seeds)
    assert verdict("recall_exact_match", gate, before, after, doubt).passed is passed


def test_less_is_better_for_a_perplexity():
    gate = Gate(regression=0.2)
    assert verdict("answer_perplexity", gate, 4.0, 3.0, Doubt(-1.0, (-1.2, -0.8), 0.1)).passed
    assert not verdict("answer_perplexity", gate, 4.0, 4.5, Doubt(0.5, (0.3, 0.7), 0.1)).passed


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


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty git repository, in which the test's own process works."""
    project = Project(tmp_path / "repository")
    project.root.mkdir()
    project.git("init", "--quiet")
    monkeypatch.chdir(project.root)
    return project


def committed(repository: Project, path: str, data: bytes) -> list[Revision]:
    """A file in the workspace and in a commit."""
    file = repository.root / path
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    repository.commit()
    return [Revision("HEAD"), Revision(WORKSPACE)]


MARKS = b"a: 1\n<<<<<<< HEAD\nb: 2\n=======\nb: 3\n>>>>>>> other\n"
LOSSES, QUALITY, ROWS = (
    "metrics/plots/loss.csv",
    "metrics/quality.json",
    "metrics/predictions.jsonl",
)
READERS = {
    "params.yaml": lambda revision: revision.params,
    "dvc.lock": lambda revision: revision.lock,
    QUALITY: lambda revision: revision.metrics,
    "metrics/costs.json": lambda revision: revision.costs,
    "metrics/noise.json": lambda revision: revision.noise,
    ROWS: lambda revision: revision.predictions,
    "loss.csv": lambda revision: revision.table("loss.csv"),
    "tradeoff.json": lambda revision: revision.table("tradeoff.json"),
}


@pytest.mark.parametrize(
    ("path", "data", "reason"),
    [
        *[(path, MARKS, r"holds a merge's conflict marks \(line 2\)") for path in READERS],
        *[(path, b"\xff\xfe", r"is not UTF-8 \(byte 0\)") for path in READERS],
        *[(path, b"[1, 2]\n", r"unreadable|lacks") for path in READERS if path != "loss.csv"],
        ("params.yaml", b"a: [", r"is unreadable \(no YAML mapping\)"),
        ("dvc.lock", b"a: [", r"is unreadable \(.*line 1"),
        ("dvc.lock", b"stages: {fetch: null}", "a stage without its files"),
        ("dvc.lock", b"stages: {fetch: {outs: [models/base]}}", "a stage without its files"),
        ("dvc.lock", b"stages: [fetch]", "a stage without its files"),
        (QUALITY, b'{"chrf": NaN}', "NaN is not a number"),
        (QUALITY, b'{"chrf": "50"}', "has no number at chrf"),
        (QUALITY, b'{"chrf": 50', r"is unreadable \(.*line 1"),
        (QUALITY, b"", r"is unreadable \(.*line 1"),
        ("metrics/costs.json", b'{"fetch": 3}', "a stage without its figures"),
        ("metrics/noise.json", b'{"metrics": {"chrf": {"values": [1]}}}', "without two values"),
        (ROWS, b"\n{}\n", "lacks 'kind' in line 2"),
        (ROWS, b"{\n", r"is unreadable \(line 1: "),
        ("loss.csv", b"split,step,loss\ntrain,1\n", "2 cells below a heading of 3: train,1"),
        ("loss.csv", b"split,step,loss\ntrain,1,nan\n", "nan is not a number"),
    ],
)
def test_a_file_that_cannot_be_read_ends_in_one_line(repository, path, data, reason):
    for revision in committed(repository, path, data):
        with pytest.raises(UserError, match=reason) as raised:
            READERS[path](revision)
        said = str(raised.value)
        assert said.startswith(path)
        assert "\n" not in said
        assert ("of HEAD" in said) is (revision.name == "HEAD")


def test_a_loss_that_is_no_number_is_named(repository):
    (repository.root / "metrics").mkdir()
    for revision in committed(repository, LOSSES, b"split,step,loss\ntrain,1,high\n"):
        with pytest.raises(UserError, match="has a row without split or loss"):
            charts.loss_curves(revision)


def test_line_separators_inside_an_answer_do_not_cut_it(repository):
    (one,) = predictions([1])
    one = replace(one, adapter="one\u2028two\u0085three\x1cfour")
    text = as_jsonl([one])
    for revision in committed(repository, ROWS, text.encode()):
        assert revision.predictions == [one]


def test_what_a_revision_lacks_is_empty(repository):
    for revision in committed(repository, "README.md", b"nothing else"):
        assert not any(read(revision) for read in READERS.values())


def test_without_a_repository_or_a_commit_there_is_one_line(repository, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^no commit here yet: make the first with"):
        find_base(None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^git rev-parse: fatal: not a git repository.*$"):
        find_base(None)


def test_a_branch_that_is_called_as_a_folder_is_and_letters_beyond_ascii(repository):
    committed(repository, "data/é.jsonl", b"1\n")
    repository.git("branch", "data")
    (repository.root / "data/é.jsonl").write_bytes(b"2\n")
    base = find_base("data")
    assert changed_files(base) == ["data/é.jsonl"]
    assert describe(base).endswith("(test)")
    assert describe(Revision(WORKSPACE)) == f"{describe(base)} with uncommitted changes"


def test_a_file_that_a_partial_clone_cannot_bring_is_named(repository, tmp_path, monkeypatch):
    committed(repository, QUALITY, b'{"chrf": 50}')
    repository.git("config", "uploadpack.allowFilter", "true")
    partial = tmp_path / "partial"
    options = ("--quiet", "--no-checkout", "--filter=blob:none")
    repository.git("clone", *options, f"file://{repository.root}", str(partial))
    shutil.move(repository.root, tmp_path / "elsewhere")
    monkeypatch.chdir(partial)
    with pytest.raises(UserError, match=r"^metrics/quality\.json of HEAD: git cannot show it: .*$"):
        READERS[QUALITY](Revision("HEAD"))


def test_a_detached_head_is_compared_with_main(repository):
    repository.git("checkout", "--quiet", "-b", "main")
    repository.commit()
    repository.git("checkout", "--quiet", "--detach")
    repository.commit()
    main = repository.git("rev-parse", "--short", "main").strip()
    assert find_base(None) == Revision(main)


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [("A", "B", True), ("A", "A", False), (None, "B", False), (None, None, False)],
)
def test_a_stage_that_ran_on_another_machine_is_known(before, after, moved):
    sides = ({"seconds": 1.0} | ({"machine": m} if m else {}) for m in (before, after))
    assert Stage("fetch", True, *sides, 0, 0).moved is moved


def test_the_machines_of_a_revision_are_named_with_their_stages(repository):
    costs = {"fetch": {"machine": "A, 2 cores"}, "adapt": {"machine": "B | C"}, "evaluate": {}}
    (repository.root / "dvc.lock").write_text("stages: {fetch: {}, adapt: {}, evaluate: {}}")
    (revision, _) = committed(repository, "metrics/costs.json", json.dumps(costs).encode())
    assert machines_of(revision) == {"A, 2 cores": ["fetch"], "B | C": ["adapt"]}
    assert in_words(machines_of(revision)) == "A, 2 cores (fetch); B | C (adapt)"
    assert in_words({"A": ["fetch", "adapt"]}) == "A"
    assert in_words({}) == "not recorded"


def test_what_the_stages_depend_on_is_read_from_dvc_lock(repository):
    lock = b"stages: {fetch: {deps: [{path: stages/fetch.py}]}, report: {}}"
    (_, workspace) = committed(repository, "dvc.lock", lock)
    assert command.inputs(workspace) == {"stages/fetch.py"}
    (repository.root / "dvc.lock").unlink()
    with pytest.raises(UserError, match=r"^no stage in dvc\.lock here: `dvc repro` writes it$"):
        command.inputs(Revision(WORKSPACE))


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


def test_the_pipelines_metrics_fit_in_the_tags_that_azure_ml_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    metrics = register.measured(Revision(WORKSPACE))
    others = 4  # content, commit, dvc.lock, what it was registered despite
    assert 10 < len(metrics) <= 50 - others - len(register.SECTIONS)


def test_what_a_version_is_registered_with_are_figures_of_quality_and_size(repository):
    (repository.root / "metrics").mkdir()
    (repository.root / "metrics/quality.json").write_text('{"chrf": 85.1}')
    (repository.root / "metrics/size.json").write_text('{"onnx_mb": 97.6}')
    (repository.root / "metrics/speed.json").write_text('{"decode_tokens_per_s_p50": 98}')
    assert register.measured(Revision(WORKSPACE)) == {"chrf": 85.1, "onnx_mb": 97.6}
