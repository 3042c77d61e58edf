"""The finetune stage on the tiny model: killed, resumed, on packed weights."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import Project, wait_until

from stages.checkpoint import load_dequantized, load_packed

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
    training = project.start(sys.executable, "-m", "stages.finetune", stdout=subprocess.DEVNULL)
    wait_until(lambda: list(project.root.glob("models/.finetune/checkpoint-[2-9]")))
    os.kill(training.pid, signal.SIGKILL)
    training.wait()
    return project


def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_adapter(killed, tmp_path):
    resumed, undisturbed = (killed.copy(tmp_path / name) for name in ("resumed", "undisturbed"))
    shutil.rmtree(undisturbed.root / CHECKPOINTS)
    assert "goes on from step" in train(resumed)
    assert "goes on" not in train(undisturbed)
    assert (resumed.root / ADAPTER).read_bytes() == (undisturbed.root / ADAPTER).read_bytes()
    assert not (resumed.root / CHECKPOINTS).exists()


def test_other_settings_do_not_go_on_from_a_checkpoint_of_these(killed, tmp_path):
    project = killed.copy(tmp_path / "project")
    project.replace("params.yaml", "max_steps: 40", "max_steps: 4")
    assert "goes on" not in train(project)


def test_packed_weights_give_what_the_dequantized_ones_give(finished):
    tokens = torch.tensor([[5, 17, 33, 101, 7]])
    folder = finished.root / "models/quantized"
    with torch.no_grad():
        packed = load_packed(folder, torch.float32)(tokens).logits
        dequantized = load_dequantized(folder)(tokens).logits
    torch.testing.assert_close(packed, dequantized, rtol=1e-4, atol=1e-4)
