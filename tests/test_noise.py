"""lab noise: which stages a seed runs again, what is run, resumed and written."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from lab import noise
from lab.review.stages import OutOfDate
from stages.core.errors import UserError
from support.project import ROOT, Project, stages_that_ran

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def test_another_seed_of_the_training_reruns_finetune_and_what_comes_after_alone():
    def outputs(stage: dict) -> set[str]:
        listed = [out for kind in ("outs", "metrics") for out in stage.get(kind, [])]
        return {path for out in listed for path in (out if isinstance(out, dict) else {out: {}})}

    watching = {
        name
        for name, stage in STAGES.items()
        if {"finetune", "finetune.seed"} & {*stage.get("params", [])}
    }
    assert watching == {"finetune"}
    assert not any("seed" in STAGES[name].get("params", []) for name in STAGES)
    again = set(watching)
    while more := {
        name
        for name, stage in STAGES.items()
        if name not in again and any(outputs(STAGES[one]) & {*stage["deps"]} for one in again)
    }:
        again |= more
    assert again == {"finetune", "adapt", "evaluate", "report"}


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Project:
    """A commit with figures, in which `dvc exp run` only writes other ones."""
    project = Project(tmp_path / "repository")
    (project.root / "metrics").mkdir(parents=True)
    project.git("init", "--quiet")
    (project.root / "dvc.yaml").write_text("stages: {}\n")
    write_results(project.root, 42)
    project.commit()
    monkeypatch.chdir(project.root)
    monkeypatch.setattr(noise, "check_ready", lambda keys: None)
    return project


def write_results(root: Path, seed: int, rank: int = 8) -> None:
    """Write what a run of a seed would: figures that the seed moves, and that it does not."""
    (root / "params.yaml").write_text(yaml.dump({"finetune": {"seed": seed, "rank": rank}}))
    figures = {"chrf": 80.0 + seed % 10, "perplexity_quantized": 17.9}
    (root / "metrics/quality.json").write_text(json.dumps(figures))
    (root / "metrics/speed.json").write_text(json.dumps({"decode_tokens_per_s_p50": 100 + seed}))
    (root / "metrics/costs.json").write_text(json.dumps({"finetune": {"machine": "a machine"}}))


def save_experiment(project: Project, name: str, edit: str | None = None, **results) -> None:
    """Make an experiment of the commit as DVC does: a commit on top of it, under refs/exps."""
    head = project.git("rev-parse", "HEAD").strip()
    write_results(project.root, **results)
    if edit:
        (project.root / edit).write_text("edited")
    project.git("add", "--all")
    project.git("commit", "--quiet", "--allow-empty", "--message", name)
    project.git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", "HEAD")
    project.git("reset", "--quiet", "--hard", head)


@pytest.fixture
def asked(repository, monkeypatch) -> list[int]:
    """The seeds that were run; the run of each only leaves an experiment."""
    found: list[int] = []

    def dvc(*words: str) -> None:
        assert words[:3] == ("exp", "run", "--temp")
        seed = int(words[-1].removeprefix("finetune.seed="))
        found.append(seed)
        save_experiment(repository, words[4], seed=seed)

    monkeypatch.setattr(noise.run, "dvc", dvc)
    return found


def test_every_seed_is_run_once_and_the_spread_is_kept(repository, asked, capsys):
    noise.noise(seeds=3)
    assert asked == [43, 44]
    found = json.loads(Path("metrics/noise.json").read_text())
    assert found["seeds"] == [42, 43, 44]
    assert found["machine"] == "a machine"
    assert found["commit"] == repository.git("rev-parse", "--short", "HEAD").strip()
    assert found["metrics"]["chrf"]["values"] == [82, 83, 84]
    assert found["metrics"]["chrf"]["standard_deviation"] == 1
    assert found["metrics"]["perplexity_quantized"]["standard_deviation"] == 0
    assert "decode_tokens_per_s_p50" not in found["metrics"]
    said = capsys.readouterr().out
    assert "chrf " in said
    assert "perplexity_quantized" not in said


def test_what_ran_already_is_not_run_again(repository, asked):
    save_experiment(repository, "by-lab-submit", seed=50)
    noise.noise(seeds=3)
    assert asked == [43]
    noise.noise(seeds=4)
    assert asked == [43, 44]
    assert json.loads(Path("metrics/noise.json").read_text())["seeds"] == [42, 43, 44, 50]


def test_experiments_of_other_settings_or_edits_are_no_seeds(repository, asked):
    save_experiment(repository, "other-rank", seed=43, rank=16)
    save_experiment(repository, "edited", seed=44, edit="finetune.py")
    noise.noise(seeds=2)
    assert asked == [43]


def test_an_interrupted_measurement_continues(repository, asked, monkeypatch):
    run_one = noise.run.dvc

    def interrupted(*words: str) -> None:
        if asked:
            raise KeyboardInterrupt
        run_one(*words)

    monkeypatch.setattr(noise.run, "dvc", interrupted)
    with pytest.raises(KeyboardInterrupt):
        noise.noise(seeds=3)
    assert not Path("metrics/noise.json").exists()
    monkeypatch.setattr(noise.run, "dvc", run_one)
    noise.noise(seeds=3)
    assert asked == [43, 44]


def test_an_edited_file_is_named_before_anything_runs(repository, asked, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(repository.root)
    (repository.root / "dvc.yaml").write_text("stages: {one: {}}\n")
    with pytest.raises(UserError, match=r"^uncommitted changes \(dvc\.yaml\): commit them first"):
        noise.noise()


@pytest.mark.parametrize(
    ("composed", "stale", "missing", "reason"),
    [
        ("finetune: {seed: 1}", [], [], r"^params\.yaml is not what conf/ composes to"),
        (
            "",
            ["finetune"],
            [],
            r"^dvc\.lock is out of date \(finetune\): `dvc repro`, then commit$",
        ),
        ("", [], ["models/base"], r"^models/base is not in DVC's cache: run `dvc repro`"),
    ],
)
def test_what_would_measure_something_else_is_refused(
    repository, monkeypatch, composed, stale, missing, reason
):
    monkeypatch.undo()
    monkeypatch.chdir(repository.root)
    monkeypatch.setattr(noise, "compose", lambda: composed or Path("params.yaml").read_text())
    late = [OutOfDate(name, [], []) for name in stale]
    monkeypatch.setattr(noise, "out_of_date", lambda: late)
    monkeypatch.setattr(noise, "not_in_cache", lambda keys: missing)
    with pytest.raises(UserError, match=reason):
        noise.check_ready({"finetune.seed"})


def test_outside_a_pipeline_there_is_one_line(repository):
    (repository.root / "dvc.yaml").unlink()
    with pytest.raises(UserError, match=r"^no dvc\.yaml here"):
        noise.noise()


@pytest.mark.slow
def test_seeds_of_the_tiny_pipeline_run_from_finetune_on_and_leave_the_workspace_alone(project):
    before = project.git("status", "--porcelain")
    said = project.run(sys.executable, "-m", "lab.cli", "noise", "--seeds", "2")
    assert stages_that_ran(said) == ["finetune", "adapt", "evaluate", "report"]
    found = json.loads((project.root / "metrics/noise.json").read_text())
    assert len(found["metrics"]["validation_loss"]["values"]) == 2
    assert project.git("status", "--porcelain") == f"{before}?? metrics/noise.json\n"
    again = project.run(sys.executable, "-m", "lab.cli", "noise", "--seeds", "2")
    assert stages_that_ran(again) == []
