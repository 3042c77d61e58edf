"""The finetune stage on the tiny model: killed, resumed, on packed weights."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from stages.core.settings import validate
from stages.training import checkpoints
from stages.weights.checkpoint import load_dequantized, load_packed
from support.processes import wait_until
from support.project import Project

pytestmark = pytest.mark.slow
ADAPTER = "models/adapter/adapter_model.safetensors"
CHECKPOINTS = "models/.finetune"


def train(project: Project) -> str:
    return project.python("stages.finetune")


@pytest.fixture(scope="module")
def killed(finished, tmp_path_factory) -> Project:
    """A clone in which training was killed after its second checkpoint. Only read it."""
    project = finished.copy(tmp_path_factory.mktemp("killed") / "project")
    project.replace("params.yaml", "max_steps: 2", "max_steps: 40")
    stage = project.start(sys.executable, "-m", "stages.finetune", stdout=subprocess.DEVNULL)
    wait_until(lambda: list(project.root.glob("models/.finetune/checkpoint-[2-9]")))
    os.kill(stage.pid, signal.SIGKILL)
    stage.wait()
    return project


def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_adapter(killed, tmp_path):
    resumed, undisturbed = (killed.copy(tmp_path / name) for name in ("resumed", "undisturbed"))
    shutil.rmtree(undisturbed.root / CHECKPOINTS)
    assert "resumes from step" in train(resumed)
    assert "resumes" not in train(undisturbed)
    assert (resumed.root / ADAPTER).read_bytes() == (undisturbed.root / ADAPTER).read_bytes()
    assert not (resumed.root / CHECKPOINTS).exists()


def test_other_settings_do_not_go_on_from_a_checkpoint_of_these(killed, tmp_path):
    project = killed.copy(tmp_path / "project")
    project.replace("params.yaml", "max_steps: 40", "max_steps: 4")
    assert "resumes" not in train(project)


def test_packed_weights_give_what_the_dequantized_ones_give(finished):
    tokens = torch.tensor([[5, 17, 33, 101, 7]])
    folder = finished.root / "models/quantized"
    with torch.no_grad():
        packed = load_packed(folder, torch.float32)(tokens).logits
        dequantized = load_dequantized(folder)(tokens).logits
    torch.testing.assert_close(packed, dequantized, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("file", "kept"),
    [
        ("stages/report.py", True),
        ("stages/training/trainer.py", False),
        ("data/prepared/train.jsonl", False),
    ],
)
def test_checkpoints_outlive_edits_of_what_finetune_does_not_depend_on(
    file, kept, tmp_path, monkeypatch, params
):
    monkeypatch.chdir(tmp_path)
    for path in ("stages/report.py", "stages/training/trainer.py", "data/prepared/train.jsonl"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("before")
    deps = ["stages/training/trainer.py", "data/prepared"]
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"finetune": {"deps": deps}}}))
    options = validate(params).finetune
    checkpoints.keep_or_clear(Path("kept"), checkpoints.fingerprint(options))
    Path("kept/checkpoint-10").mkdir()
    Path(file).write_text("after")
    checkpoints.keep_or_clear(Path("kept"), checkpoints.fingerprint(options))
    assert Path("kept/checkpoint-10").exists() == kept
