"""The finetune stage on the tiny model: killed, in several processes, on packed weights."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import Project, wait_until

from stages.checkpoint import load_dequantized, load_packed

pytestmark = pytest.mark.slow
ADAPTER = "models/adapter/adapter_model.safetensors"


def train(project: Project) -> str:
    return project.python("stages.finetune")


def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_adapter(project, tmp_path):
    project.replace("params.yaml", "max_steps: 2", "max_steps: 40")
    undisturbed = project.copy(tmp_path / "undisturbed")
    killed = project.start(sys.executable, "-m", "stages.finetune", stdout=subprocess.DEVNULL)
    checkpoints = project.root / "models/.finetune"
    wait_until(lambda: list(checkpoints.glob("checkpoint-[2-9]")))
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert checkpoints.exists()
    assert "goes on from step" in train(project)
    assert "goes on" not in train(undisturbed)
    assert (project.root / ADAPTER).read_bytes() == (undisturbed.root / ADAPTER).read_bytes()
    assert not checkpoints.exists()


def test_other_settings_do_not_go_on_from_a_checkpoint_of_these(project):
    project.replace("params.yaml", "max_steps: 2", "max_steps: 40")
    killed = project.start(sys.executable, "-m", "stages.finetune", stdout=subprocess.DEVNULL)
    wait_until(lambda: list(project.root.glob("models/.finetune/checkpoint-[2-9]")))
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    project.replace("params.yaml", "max_steps: 40", "max_steps: 4")
    assert "goes on" not in train(project)


def test_packed_weights_give_what_the_dequantized_ones_give(finished):
    tokens = torch.tensor([[5, 17, 33, 101, 7]])
    folder = finished.root / "models/quantized"
    with torch.no_grad():
        packed = load_packed(folder, torch.float32)(tokens).logits
        dequantized = load_dequantized(folder)(tokens).logits
    torch.testing.assert_close(packed, dequantized, rtol=1e-4, atol=1e-4)
