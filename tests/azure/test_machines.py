"""Three machines and one remote, on the real pipeline with the tiny model: who computes, what travels."""

import re
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from support.blob_service import Container, Project, cloned, lab, new_container
from support.project import stages_that_ran

pytestmark = [pytest.mark.azure, pytest.mark.slow, pytest.mark.longest]
MORE_TRAINING = ["-S", "finetune.max_steps=3"]


@pytest.fixture(scope="module")
def container(lasting) -> Container:
    return new_container(lasting)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("machines")


@pytest.fixture(scope="module")
def origin(finished, folder) -> Project:
    """The git server: a bare clone of the finished project's commit."""
    subprocess.run(
        ["git", "clone", "--quiet", "--bare", finished.root, folder / "origin"], check=True
    )
    return Project(folder / "origin")


@pytest.fixture(scope="module")
def pushed(finished, container, folder) -> Container:
    """The container after the machine that ran everything has pushed."""
    first = container.connect(finished.copy(folder / "first"))
    said = lab(first, "run")
    assert stages_that_ran(said) == []
    return container


@pytest.fixture
def machine(origin, pushed, tmp_path) -> Project:
    """A fresh clone with an empty cache."""
    return pushed.connect(cloned(origin, tmp_path / "machine"))


@pytest.fixture(scope="module")
def trained(origin, pushed, folder) -> tuple[Project, str, dict, dict]:
    """A GPU machine after `lab run -S finetune.max_steps=3`: what it said, the blobs before and after."""
    machine = pushed.connect(cloned(origin, folder / "gpu"))
    before = pushed.objects()
    said = lab(machine, "run", "--name", "longer", *MORE_TRAINING)
    return machine, said, before, pushed.objects()


def received(said: str) -> float:
    """Return the megabytes that came from the remote."""
    return sum(map(float, re.findall(r"received ([0-9.]+) MB", said)))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_second_clone_executes_nothing_and_fetches_no_model(machine):
    started = time.monotonic()
    said = lab(machine, "dvc", "repro", "--pull", "--allow-missing")
    print(f"second clone: {time.monotonic() - started:.1f} s, {received(said)} MB received")
    assert stages_that_ran(said) == []
    assert not (machine.root / "models").exists()
    assert received(said) < 0.1
    assert machine.git("status", "--short") == ""


def test_the_plain_commands_do_the_same(machine):
    assert stages_that_ran(machine.dvc("repro", "--pull", "--allow-missing")) == []
    assert not (machine.root / "models").exists()


def test_a_review_needs_no_pull(machine):
    machine.dvc("metrics", "diff", "HEAD")
    assert "perplexity_float" in machine.dvc("metrics", "show")
    assert not (machine.root / ".dvc/cache/files").exists()


def test_one_changed_parameter_runs_only_its_stages_and_pulls_only_what_they_read(trained):
    machine, said, _, _ = trained
    assert set(stages_that_ran(said)) == {"finetune", "adapt", "evaluate", "report"}
    assert not (machine.root / "models/base").exists()
    assert "$ dvc exp run --pull --allow-missing --name longer -S finetune.max_steps=3" in said
    assert "$ dvc push --run-cache" in said
    assert "$ dvc exp push --no-cache origin longer" in said


def test_its_push_sends_the_adapter_and_the_small_results_alone(trained):
    machine, _, before, after = trained
    new = {md5: size for md5, size in after.items() if md5 not in before}
    outs = yaml.safe_load((machine.root / "dvc.lock").read_text())["stages"]
    sent = {out["md5"] for stage in outs.values() for out in stage["outs"]} & new.keys()
    named = {o["path"] for s in outs.values() for o in s["outs"] if o["md5"] in sent}
    timings = {name for name in named if name.startswith("metrics/speed/")}  # some come out alike
    assert named - timings - {"metrics/predictions.jsonl"} == {  # git's copy of the last one
        "models/adapter",
        "models/onnx_adapter",
        "metrics/raw/finetune.json",
        "metrics/raw/evaluate.json",
        "metrics/raw/predictions.jsonl",
    }
    adapter = size_of(machine.root / "models/adapter") + size_of(
        machine.root / "models/onnx_adapter"
    )
    results = size_of(machine.root / "metrics/raw") + size_of(machine.root / "metrics/speed")
    everything = sum(before.values())
    print(f"pushed {sum(new.values())} bytes of new objects; the first push had {everything}")
    assert sum(new.values()) < adapter + results + 10_000  # the lists of directories


def test_a_combination_that_ran_elsewhere_is_restored_without_executing(machine, trained):
    said = lab(machine, "dvc", "exp", "run", "--pull", "--allow-missing", *MORE_TRAINING)
    assert stages_that_ran(said) == ["report"]  # writes what git tracks, in a second
    for stage in ("finetune", "adapt", "evaluate"):
        assert f"Stage '{stage}' is cached - skipping run" in said
    there, _, _, _ = trained
    assert (machine.root / "dvc.lock").read_text() == (there.root / "dvc.lock").read_text()


def test_the_laptop_gets_the_experiment_of_the_gpu_machine_without_a_model(machine, trained):
    machine.dvc("exp", "pull", "--no-cache", "origin", "longer")
    assert "perplexity" in machine.dvc("metrics", "diff", "--all", "HEAD", "longer")
    machine.dvc("exp", "branch", "longer", "longer-training")
    machine.git("switch", "--quiet", "longer-training")
    there, _, _, _ = trained
    for file in ("params.yaml", "dvc.lock", "metrics/quality.json"):
        assert (machine.root / file).read_text() == (there.root / file).read_text()
    assert stages_that_ran(lab(machine, "dvc", "repro", "--pull", "--allow-missing")) == []
    assert not (machine.root / "models").exists()
