"""Quantize and finetune in two processes on a tiny model: the result of one, and one end for all of them."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from stages.core.ranks import PLACE
from stages.params import compose
from stages.training import together
from support.processes import output_of, wait_until
from support.project import ROOT, Project
from support.tiny_models import FAMILIES, checkpoint
from test_loss_curve import rows

SETTINGS = [
    "finetune.max_steps=10",
    "finetune.batch_size=5",  # two processes have 3 and 2 of them
    "finetune.eval_steps=5",
    "finetune.warmup_steps=1",
    "finetune.validation_rows=12",  # batches of 5, 5 and 2
]
ADAPTER = "models/adapter/adapter_model.safetensors"


def copy_code(root: Path) -> None:
    for folder in ("conf", "stages"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)


def with_settings(project: Project, *overrides: str) -> Project:
    (project.root / "params.yaml").write_text(compose(overrides, ROOT / "conf"))
    return project


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """Two processes need no two GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def untrained(once) -> Project:
    """A folder with all that finetune reads, and the stages' code; in float32, whatever the CPU has."""

    def make(root: Path) -> None:
        packed = checkpoint(root / "made", FAMILIES["tied"])
        shutil.copytree(packed, root / "models/quantized")
        (root / "data/prepared").mkdir(parents=True)
        for name, first, last in (("train", 0, 60), ("validation", 60, 72), ("test", 72, 75)):
            (root / f"data/prepared/{name}.jsonl").write_text(rows(first, last))
        copy_code(root)
        shutil.copy(ROOT / "dvc.yaml", root)
        hardware = root / "stages/weights/hardware.py"
        hardware.write_text(hardware.read_text() + "\n\nfast_dtype = lambda: torch.float32\n")

    return Project(once("untrained", make))


@pytest.fixture(scope="module")
def unquantized(once) -> Project:
    """A folder with all that quantize reads, for three layers, and the stages' code."""

    def make(root: Path) -> None:
        made = root.with_name("unquantized-made")
        checkpoint(made, FAMILIES["tied"] | {"num_hidden_layers": 3})
        shutil.copytree(made / "base", root / "models/base")
        (root / "data/prepared").mkdir(parents=True)
        for name in ("calibration", "validation"):
            (root / f"data/prepared/{name}.jsonl").write_text(rows(0, 60))
        shutil.copy(ROOT / "data/heldout.txt", root / "data")
        copy_code(root)

    return Project(once("unquantized", make))


@pytest.fixture
def folder(untrained, tmp_path):
    """Return a function that makes a copy with settings of its own."""

    def make(*overrides: str, name: str = "project") -> Project:
        return with_settings(untrained.copy(tmp_path / name), *SETTINGS, *overrides)

    return make


def finetune(project: Project, **options) -> str:
    return project.python("stages.finetune", **options)


def curve(project: Project) -> list[float]:
    found = json.loads((project.root / "metrics/raw/finetune.json").read_text())
    return [each["loss"] for each in found["train"] + found["validation"]]


def processes_in(project: Project) -> list[psutil.Process]:
    def is_in(process: psutil.Process) -> bool:
        try:
            return process.cwd() == str(project.root) and process.status() != "zombie"
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if is_in(process)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["finetune.shard=true"],
        ["finetune.shard=true", "finetune.base=packed", "finetune.gradient_checkpointing=true"],
    ],
    ids=["whole", "sharded", "sharded packed"],
)
def test_two_processes_train_what_one_does(folder, settings, monkeypatch):
    one = folder("finetune.processes=1", *[s for s in settings if "shard" not in s], name="one")
    two = folder("finetune.processes=2", *settings, name="two")
    assert "processes" not in finetune(one)
    monkeypatch.setenv("LOCAL_RANK", "7")  # a cluster's launcher started the stage
    assert "in 10 steps, 2 processes in" in finetune(two)
    assert curve(two) == pytest.approx(curve(one), abs=1e-4)
    assert len(set(curve(one))) == len(curve(one)), "nothing was learned"
    torch.testing.assert_close(
        load_file(two.root / ADAPTER), load_file(one.root / ADAPTER), rtol=0, atol=2e-4
    )
    names = {file.name for file in (one.root / "models/adapter").iterdir()}
    assert {file.name for file in (two.root / "models/adapter").iterdir()} == names
    tokens = [json.loads((p.root / "metrics/speed/training.json").read_text()) for p in (one, two)]
    assert all(each["tokens_per_second"] > 0 for each in tokens)
    assert processes_in(two) == []


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["first", "last", "stage"])
def test_a_killed_process_ends_all_and_the_next_run_resumes_to_the_same_adapter(folder, killed):
    settings = ["finetune.processes=2", "finetune.max_steps=40", "finetune.dropout=0.1"]
    project = folder(*settings)
    stage = project.start(sys.executable, "-m", "stages.finetune")
    wait_until(lambda: list(project.root.glob("models/.finetune/checkpoint-*/trainer_state.json")))
    family = psutil.Process(stage.pid)
    ranks = {each.environ()[PLACE].split()[0]: each for each in family.children()}
    assert sorted(ranks) == ["0", "1"]
    {"first": ranks["0"], "last": ranks["1"], "stage": family}[killed].kill()
    said = output_of(stage)
    wait_until(lambda: not processes_in(project))
    if killed == "stage":
        assert stage.returncode == -signal.SIGKILL
    else:
        number = {"first": 1, "last": 2}[killed]
        assert stage.returncode == 1
        last = said.splitlines()[-1]
        assert last.startswith(f"finetune: process {number} of 2 was killed by SIGKILL: ")
        assert "Traceback" not in said
    assert not (project.root / ADAPTER).exists()
    assert "resumes from step" in finetune(project)
    resumed = (project.root / ADAPTER).read_bytes()
    if killed == "last":
        undisturbed = folder(*settings, name="undisturbed")
        assert "resumes" not in finetune(undisturbed)
        assert (undisturbed.root / ADAPTER).read_bytes() == resumed


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(folder):
    project = folder("finetune.processes=2", "finetune.max_steps=1000")
    stage = project.start(sys.executable, "-m", "stages.finetune")
    wait_until(lambda: list(project.root.glob("models/.finetune/checkpoint-*")))
    os.kill(stage.pid, signal.SIGINT)
    assert output_of(stage).splitlines()[-1].endswith("interrupted")
    assert processes_in(project) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "line", "traceback"),
    [
        ("UserError('a row is odd')", "finetune: a row is odd", False),
        ("MemoryError()", "finetune: out of memory: close other programs or choose a smaller model", False),
        ("KeyError('a bug')", "finetune: process 2 of 2 failed: its traceback is above", True),
    ],
)  # fmt: skip
def test_an_error_of_one_process_is_the_stages(folder, error, line, traceback):
    project = folder("finetune.processes=2")
    project.replace(
        "stages/finetune.py",
        "    set_seed(options.seed)\n",
        "    from stages.core.errors import UserError\n"
        f"    if together.rank() == 1:\n        raise {error}\n    set_seed(options.seed)\n",
    )
    said = finetune(project, exits=1)
    assert said.splitlines()[-1] == line
    assert ("Traceback" in said) == traceback
    assert processes_in(project) == []


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_is_one_line(folder):
    project = folder("finetune.processes=2")
    project.replace(
        "stages/training/trainer.py",
        "        return (loss, outputs) if return_outputs else loss\n",
        "        loss = loss * (float('nan') if together.rank() == 1 else 1)\n"
        "        return (loss, outputs) if return_outputs else loss\n",
    )
    said = finetune(project, exits=1)
    assert "finetune: loss is not finite at step 5: nothing is saved" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not list(project.root.glob("models/.finetune/checkpoint-*"))


@pytest.mark.slow
def test_shard_in_one_process_is_said_to_change_nothing(folder):
    assert "finetune.shard changes nothing in one process" in finetune(
        folder("finetune.shard=true")
    )


@pytest.fixture
def quantizing(unquantized, tmp_path):
    """Return a function that makes a copy with settings of its own; the model writes 80 pieces, in batches
    of 64 and 16."""

    def make(*overrides: str, name: str = "project") -> Project:
        settings = [
            "quantize.group_size=32",
            "quantize.calibration_sequences=60",
            "quantize.calibration_length=32",
            "quantize.self_text_share=0.67",
            "quantize.perplexity_sequences=3",
            "quantize.perplexity_length=32",
            "quantize.tuning_steps=2",
        ]
        return with_settings(unquantized.copy(tmp_path / name), *settings, *overrides)

    return make


def quantize(project: Project, **options) -> str:
    return project.python("stages.quantize", **options)


def files_of(project: Project) -> dict[str, bytes]:
    folder = project.root / "models/quantized"
    made = {file.name: file.read_bytes() for file in folder.iterdir()}
    return made | {"metrics": (project.root / "metrics/raw/quantize.json").read_bytes()}


@pytest.mark.slow
def test_two_and_three_processes_quantize_to_the_bytes_of_one(quantizing):
    one = quantizing(name="one")
    assert "processes" not in quantize(one)
    expected = files_of(one)
    for number in (2, 3):
        several = quantizing(f"quantize.processes={number}", name=str(number))
        assert f", {number} processes in" in quantize(several)
        assert files_of(several) == expected
        assert processes_in(several) == []


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["first", "last", "stage"])
def test_a_killed_process_ends_all_of_quantize_and_leaves_nothing_half_written(quantizing, killed):
    project = quantizing("quantize.processes=2")
    project.replace(
        "stages/quantization/awq.py",
        "        hidden, grams = run_and_watch(layer, groups, hidden, given)\n",
        "        hidden, grams = run_and_watch(layer, groups, hidden, given)\n"
        "        from pathlib import Path\n"
        "        Path(f'has-begun-{rank()}').touch()\n"
        "        __import__('time').sleep(1000)\n",
    )
    stage = project.start(sys.executable, "-m", "stages.quantize")
    wait_until(lambda: len(list(project.root.glob("has-begun-*"))) == 2)
    family = psutil.Process(stage.pid)
    ranks = {each.environ()[PLACE].split()[0]: each for each in family.children()}
    {"first": ranks["0"], "last": ranks["1"], "stage": family}[killed].kill()
    said = output_of(stage)
    wait_until(lambda: not processes_in(project))
    if killed == "stage":
        assert stage.returncode == -signal.SIGKILL
    else:
        number = {"first": 1, "last": 2}[killed]
        assert stage.returncode == 1
        last = said.splitlines()[-1]
        assert last.startswith(
            f"quantize: process {number} of 2 was killed by SIGKILL: run `dvc repro` "
        )
        assert "quantize.processes" in last
        assert "Traceback" not in said
    assert not (project.root / "models/quantized").exists()
    assert not (project.root / "metrics").exists()


@pytest.mark.slow
def test_more_processes_than_layers_are_refused_and_rounding_needs_none(quantizing):
    refused = quantize(quantizing("quantize.processes=4"), exits=1).splitlines()[-1]
    assert refused.startswith("quantize: quantize.processes is 4: must be auto or at most 3")
    rounding = quantizing("quantize=rtn", "quantize.processes=2", name="rtn")
    said = quantize(rounding)
    assert "quantize.processes changes nothing with quantize=rtn" in said
    assert "2 processes" not in said


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_rows_of_every_step_are_split_and_none_is_lost(count, monkeypatch):
    ordered = Dataset.from_dict({"row": list(range(20))})
    shares = []
    for rank in range(count):
        if count > 1:
            monkeypatch.setenv(PLACE, f"{rank} {count} /nowhere")
        size = len(together.my_share(5))
        mine = together.my_rows(ordered, 5)["row"]
        shares.append([list(mine[at : at + size]) for at in range(0, len(mine), size)])
    for step in range(4):
        assert [row for share in shares for row in share[step]] == list(
            range(5 * step, 5 * step + 5)
        )
    sizes = [len(share[0]) for share in shares]
    assert max(sizes) - min(sizes) <= 1
