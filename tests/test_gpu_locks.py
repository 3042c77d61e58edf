"""Two stages never share a GPU: files that stand for GPUs are locked by real processes."""

import shutil
import subprocess
import sys

import psutil
import pytest

from stages import quantize
from stages.core import gpu_locks, process
from stages.core import places as machine
from stages.core.errors import UserError
from stages.core.settings import validate
from stages.training import places
from support.processes import output_of, wait_until
from support.project import ROOT, Project

GPUS = ["GPU-aa", "GPU-bb"]
STAGE = """
import sys
from stages.core import gpu_locks
gpu_locks.known_gpus = lambda: {known}
print("has", *gpu_locks.take({gpus}, {least}, {most}), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Return a function that starts a process which takes GPUs and keeps them until its input ends."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    started = []

    def start(least: int, most: int, gpus=("0", "1"), known=GPUS) -> subprocess.Popen:
        code = STAGE.format(known=known, gpus=list(gpus), least=least, most=most)
        one = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(one)
        return one

    yield start
    for one in started:
        one.kill()
        one.communicate()


def line(one: subprocess.Popen) -> str:
    return one.stdout.readline().strip()


def test_two_stages_at_once_have_a_gpu_each_and_a_third_waits_until_one_has_ended(stage):
    first, second = stage(1, 1), stage(1, 1)
    assert {line(first), line(second)} == {"has 0", "has 1"}
    third = stage(1, 1)
    assert line(third) == "waits for a GPU: other stages use 0, 1"
    first.kill()  # however it ends
    assert line(third).startswith("has ")
    assert output_of(second, "") == ""


def test_all_free_gpus_are_taken_but_none_that_is_in_use(stage):
    assert line(stage(1, 1)) == "has 0"
    assert line(stage(1, 2)) == "has 1"


def test_a_stage_that_wants_two_keeps_none_while_it_waits(stage):
    one = stage(1, 1)
    assert line(one) == "has 0"
    both = stage(2, 2)
    assert line(both).startswith("waits for a GPU")
    assert line(stage(1, 1)) == "has 1"
    one.kill()


def test_a_number_and_an_identifier_are_the_same_gpu(stage):
    assert line(stage(1, 1, gpus=["0"])) == "has 0"
    assert line(stage(1, 2, gpus=["GPU-a", "GPU-b"])) == "has GPU-b"


def test_without_gpus_nothing_is_locked(stage, tmp_path):
    assert [line(stage(1, 1, known=[])) for _ in range(2)] == ["has 0", "has 0"]
    assert not list(tmp_path.glob("olive-lab-gpu-*"))


@pytest.fixture
def gpu_machine(tmp_path, monkeypatch):
    """Pretend that this machine has two GPUs; this process holds the first, as a stage does."""
    monkeypatch.setattr(gpu_locks.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpu_locks, "known_gpus", lambda: GPUS)
    monkeypatch.setattr(places, "device", lambda: "cuda")
    monkeypatch.setattr(process, "gpus", ["0", "1"])
    monkeypatch.setattr(machine, "queue_workers", lambda: 0)
    gpu_locks.take(["0", "1"], 1, 1)
    yield monkeypatch
    gpu_locks.keep(set())


@pytest.mark.parametrize(
    ("processes", "workers", "found"),
    [
        ("auto", 0, ["0", "1"]),
        ("auto", 1, ["0", "1"]),
        ("auto", 2, ["0"]),
        ("auto", 3, ["0"]),
        (1, 0, ["0"]),
        (2, 2, ["0", "1"]),
    ],
)
def test_training_takes_the_gpus_that_its_processes_need(
    gpu_machine, params, processes, workers, found
):
    gpu_machine.setattr(machine, "queue_workers", lambda: workers)
    params["finetune"] |= {"processes": processes, "batch_size": 16}
    assert places.places(validate(params).finetune) == found


def test_a_step_of_few_rows_takes_one_gpu_unless_the_base_needs_several(gpu_machine, params):
    params["finetune"]["batch_size"] = 15
    assert places.places(validate(params).finetune) == ["0"]
    params["finetune"]["shard"] = True
    assert places.places(validate(params).finetune) == ["0", "1"]


def test_more_processes_than_gpus_are_refused(gpu_machine, params):
    params["finetune"]["processes"] = 3
    with pytest.raises(UserError, match=r"finetune\.processes is 3, but 2 of this machine's GPUs"):
        places.places(validate(params).finetune)


@pytest.mark.parametrize(
    ("settings", "layers", "found"),
    [
        ({}, 30, ["0", "1"]),
        ({}, 1, ["0"]),
        ({"processes": 1}, 30, ["0"]),
        ({"processes": 2}, 30, ["0", "1"]),
        ({"method": "rtn", "processes": 2}, 30, ["0"]),
    ],
)
def test_quantizing_takes_a_gpu_for_each_process_that_has_a_layer(
    gpu_machine, params, settings, layers, found
):
    gpu_machine.setattr(quantize, "device", lambda: "cuda")
    params["quantize"] |= settings
    assert quantize.places_of(validate(params).quantize, layers) == found


def test_auto_is_one_process_on_a_cpu(params, monkeypatch):
    for module in (places, quantize):
        monkeypatch.setattr(module, "device", lambda: "cpu")
    assert places.places(validate(params).finetune) == [""]
    assert quantize.places_of(validate(params).quantize, 30) == [""]


def test_a_worker_of_dvcs_queue_is_counted():
    before = machine.queue_workers()
    name = "import time; time.sleep(60)"
    command = [sys.executable, "-c", name, "dvc", "exp", "queue-worker", "dvc-exp-0-1@localhost"]
    worker = subprocess.Popen(command)
    try:
        wait_until(lambda: machine.queue_workers() > before)
    finally:
        worker.kill()
        worker.wait()


QUEUED = """
import os, time
from pathlib import Path
import yaml

number = yaml.safe_load(Path("params.yaml").read_text())["number"]
took = Path(os.environ["TOOK"])
(took / f"{number}.part").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
(took / f"{number}.part").rename(took / f"{number}.txt")
while len(list(took.glob("*.txt"))) < 2:  # neither ends before the other has begun
    time.sleep(0.1)
Path("out.txt").write_text(str(number))
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A repository with one stage, which begins as ours do and says which GPU it has, on a machine of two."""
    (tmp_path / "took").mkdir()
    for name, value in {
        "TMPDIR": str(tmp_path),
        "TOOK": str(tmp_path / "took"),
        "CUDA_VISIBLE_DEVICES": "0,1",
    }.items():
        monkeypatch.setenv(name, value)
    project = Project(tmp_path / "queue")
    shutil.copytree(ROOT / "stages/core", project.root / "stages/core")
    shutil.copy(ROOT / "stages/__init__.py", project.root / "stages")
    (project.root / "stages/quantize.py").write_text(QUEUED)
    with (project.root / "stages/core/gpu_locks.py").open("a") as code:
        code.write(f"\n\nknown_gpus = lambda: {GPUS}\n")
    (project.root / "params.yaml").write_text("number: 0\n")
    stage = "{cmd: python -m stages.quantize, params: [number], outs: [out.txt]}"
    (project.root / "dvc.yaml").write_text(f"stages: {{quantize: {stage}}}\n")
    (project.root / ".gitignore").write_text("__pycache__\nout.txt\n")
    project.git("init", "--quiet")
    project.dvc("init", "--quiet")
    project.commit()
    yield project
    for each in psutil.process_iter(["cwd"]):  # a worker that waits for more
        if (each.info["cwd"] or "").startswith(str(project.root)):
            each.kill()


@pytest.mark.slow
def test_two_experiments_of_dvcs_queue_have_a_gpu_each_at_the_same_time(queue, tmp_path):
    for number in (1, 2):
        queue.dvc("exp", "run", "--queue", "--name", f"exp-{number}", "-S", f"number={number}")
    queue.dvc("queue", "start", "-j", "2")
    took = tmp_path / "took"
    wait_until(lambda: {file.name for file in took.glob("*.txt")} == {"1.txt", "2.txt"})
    assert {file.read_text() for file in took.glob("*.txt")} == {"0", "1"}
    wait_until(lambda: queue.dvc("queue", "status").count("Success") == 2)
