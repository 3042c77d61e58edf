"""How stages end: what a user can put right is one line, a bug is a traceback."""

import errno
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors import SafetensorError

from stages.core.errors import UserError
from stages.core.files import write_json, written_beside
from stages.core.running import one_line_errors
from support.project import ROOT

FULL = "the disk is full: free some space"
MEMORY = "out of memory: close other programs"
GPU_MEMORY = "the GPU is out of memory: close what else uses it (nvidia-smi), or turn down"
SHARED = "another process has the GPU for itself"
OLD = "this GPU is older than what PyTorch or ONNX Runtime was built for"
ALLOCATOR = "[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("seed is missing"), "seed is missing"),
        (OSError(errno.ENOSPC, "No space left on device"), FULL),
        (SafetensorError("I/O error: No space left on device (os error 28)"), FULL),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), FULL),
        (MemoryError(), MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), MEMORY),
        (RuntimeError(ALLOCATOR), MEMORY),
        (RuntimeError("Failed to allocate memory for requested buffer of size 8"), MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), GPU_MEMORY),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            GPU_MEMORY,
        ),
        (PermissionError(errno.EACCES, "Permission denied", "models"), "models: Permission denied"),
        (KeyboardInterrupt(), "interrupted"),
        # clusters let one process have a GPU (pytorch-image-models#1033, ms-swift#5118)
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), SHARED),
        (Exception("CUDA failure 209: no kernel image is available for execution"), OLD),
    ],
)
def test_what_a_user_can_put_right_is_one_line(error, line):
    with pytest.raises(SystemExit) as end, one_line_errors("fake"):
        raise error
    assert str(end.value.code).startswith(f"fake: {line}")
    assert len(str(end.value.code).splitlines()) == 1


def test_what_failed_holds_no_model_to_the_end_of_the_process():
    # a model on a GPU that outlives CUDA's libraries ends in a segmentation fault, seen on an H200
    class Model: ...

    models = []

    def work() -> None:
        model = Model()
        models.append(weakref.ref(model))
        raise UserError("no such adapter")

    with pytest.raises(SystemExit), one_line_errors("fake"):
        work()
    assert models[0]() is None


def test_a_bug_stays_a_traceback():
    with pytest.raises(RuntimeError, match="shapes"), one_line_errors("fake"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def fail_half_way(file):
    file.write_text("half of the sec")
    raise ZeroDivisionError


def test_a_file_or_folder_is_there_whole_or_as_it_was(tmp_path):
    target = tmp_path / "result"
    with written_beside(target) as beside:
        beside.write_text("first")
    with pytest.raises(ZeroDivisionError), written_beside(target) as beside:
        fail_half_way(beside)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("result", "first")]
    for _ in range(2):  # a folder takes the place of a file, then of a folder
        with written_beside(target) as beside:
            beside.mkdir()
    assert [f.name for f in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_metrics_file_ever_holds_nan(tmp_path, value):
    target = tmp_path / "quality.json"
    with pytest.raises(UserError, match=r"quality\.json: scores\.1 is not a finite number"):
        write_json(target, {"scores": [1.0, value]})
    assert not target.exists()


def test_what_a_stage_made_can_be_read_by_those_who_may_read_the_users_files(tmp_path):
    """safetensors makes its files private, and a shared cache would keep them so."""
    (tmp_path / "usual").touch()
    with written_beside(tmp_path / "made") as folder:
        folder.mkdir()
        (folder / "model.safetensors").touch(mode=0o600)
    made = (tmp_path / "made/model.safetensors").stat().st_mode
    assert made == (tmp_path / "usual").stat().st_mode


def test_ctrl_c_while_a_stage_still_imports_is_one_word():
    begins = "import os, signal, sys; sys.argv = ['-m']; import stages; os.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", begins], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "interrupted\n")
