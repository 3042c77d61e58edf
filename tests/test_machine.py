"""One GPU of several, chosen before any library sees them."""

import subprocess
import sys

import pytest

from stages.core import machine
from support.project import ROOT


@pytest.fixture
def visible(monkeypatch):
    """Set CUDA_VISIBLE_DEVICES and how many GPUs the machine has; return what the stage then sees."""

    def choose(given: str | None, files: int = 0) -> tuple[str, str]:
        monkeypatch.delenv(machine.VISIBLE, raising=False)
        if given is not None:
            monkeypatch.setenv(machine.VISIBLE, given)
        names = [f"nvidia{number}" for number in range(files)] + ["nvidiactl", "nvidia-uvm"]
        monkeypatch.setattr(
            machine.Path, "glob", lambda *_: [machine.Path("/dev", n) for n in names]
        )
        monkeypatch.setattr(machine.gpu_locks, "known_gpus", list)  # a real one is not locked
        said = machine.use_one_gpu(alone=True)
        return machine.os.environ[machine.VISIBLE], said

    return choose


@pytest.mark.parametrize(
    ("given", "files", "used", "said"),
    [
        (None, 0, "0", ""),
        (None, 1, "0", ""),
        (None, 2, "0", "GPU 0, the first of 2 (CUDA_VISIBLE_DEVICES chooses another)"),
        ("1", 2, "1", ""),
        ("2,3", 4, "2", "GPU 2, the first of 2 (CUDA_VISIBLE_DEVICES chooses another)"),
        ("GPU-5a, GPU-77", 2, "GPU-5a", "GPU GPU-5a, the first of 2 (CUDA_VISIBLE_DEVICES chooses another)"),
        ("", 2, "", ""),
        ("-1", 2, "-1", ""),
    ],
)  # fmt: skip
def test_the_first_visible_gpu_is_used(visible, given, files, used, said):
    assert visible(given, files) == (used, said)


def test_a_stage_has_chosen_before_any_library_is_imported():
    """Torch and ONNX Runtime read the variable once, at their first call."""
    code = (
        "import stages, os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[0] = '-m'\n{code}"],
        cwd=ROOT,
        env={"CUDA_VISIBLE_DEVICES": "3,1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["3", "False"], done.stderr


def test_a_machine_has_a_name_with_its_processor_and_cores():
    assert machine.processor() in machine.machine()
    assert machine.machine().endswith(" cores") or "cores, " in machine.machine()
