"""Where a stage computes: a GPU that is there and cannot be used is never quietly replaced by the CPU."""

import subprocess
import sys

import pytest
import torch

from lab import doctor
from stages.core import gpu_locks
from stages.core.errors import UserError
from stages.weights import hardware


@pytest.fixture
def broken_gpu(monkeypatch):
    """Return a function that makes this look like a machine with a GPU for which CUDA gives a reason."""

    def give(reason: str, build: str | None = "13.0") -> None:
        def init() -> None:
            raise RuntimeError(reason)

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(gpu_locks, "known_gpus", lambda: ["GPU-1"])
        monkeypatch.setattr(hardware, "visible_gpus", lambda: given or ["0"])

    given: list[str] = []
    give.visible = given  # type: ignore[attr-defined]
    return give


COUNT = "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before? Error "


# pytorch/pytorch#35710, #30528 and #81549: nobody was told why is_available() was False
@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (COUNT + "802: system not yet initialized", "systemctl start nvidia-fabricmanager"),
        (COUNT + "803: system has unsupported display driver / cuda driver combination", "restart"),
        (COUNT + "999: unknown error", "cannot use: Error 999: unknown error; `"),
        ("The NVIDIA driver on your system is too old (found version 12040).", "install the 580"),
    ],
)
def test_a_gpu_that_cuda_cannot_use_is_said_with_the_reason(broken_gpu, reason, line):
    broken_gpu(reason)
    with pytest.raises(
        UserError, match="this machine has a GPU, which PyTorch cannot use: "
    ) as said:
        hardware.device()
    assert line in str(said.value)
    assert "`CUDA_VISIBLE_DEVICES= dvc repro` uses the CPU" in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("visible", ["-1", "NoDevFiles"])
def test_who_hides_the_gpu_computes_on_the_cpu(broken_gpu, visible):
    broken_gpu("No CUDA GPUs are available")
    broken_gpu.visible.append(visible)
    assert hardware.device() == "cpu"


def test_the_cpu_packages_compute_on_the_cpu_whatever_is_there(broken_gpu):
    broken_gpu("Torch not compiled with CUDA enabled", build=None)
    assert hardware.device() == "cpu"


def test_the_doctor_gives_the_reason_too(broken_gpu, monkeypatch):
    broken_gpu(COUNT + "802: system not yet initialized")
    smi = subprocess.CompletedProcess([], 0, stdout="NVIDIA H100, 550.54, 81559 MiB\n", stderr="")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: smi)
    with pytest.raises(UserError, match=r"torch cannot use NVIDIA H100, .*nvidia-fabricmanager"):
        doctor.gpu()
    monkeypatch.setattr(torch.version, "cuda", None)  # the CPU's packages
    with pytest.raises(UserError, match=r"MiB: rm -rf .venv, make setup EXTRA=cuda"):
        doctor.gpu()


def test_the_doctor_says_that_packages_are_compiled_at_every_start(monkeypatch, tmp_path):
    # many images set PYTHONDONTWRITEBYTECODE: 10 s of every stage on an H200
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    assert "PYTHONDONTWRITEBYTECODE is set" in doctor.compiled_anew()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert doctor.compiled_anew() == ""
