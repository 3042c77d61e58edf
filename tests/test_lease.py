"""Leases of GPUs: real processes and real locks; only nvidia-smi, which names the GPUs, is made up."""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, wait_until

PATIENCE = 300  # seconds; far more than a start takes where every core is busy
JOB = """
import os, sys
from stages import lease
from stages.settings import load
settings = load()
settings = settings.model_copy(
    update={"finetune": settings.finetune.model_copy(update={"num_processes": int(sys.argv[1])})}
)
lease.lease_gpus("finetune", settings)
print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
sys.stdin.read()
"""


class Job:
    """A process that leases GPUs and keeps them until it is killed."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.says, self.complains = lines(process.stdout), lines(process.stderr)

    def kill(self) -> None:
        """End it as the machine's out-of-memory killer would: nothing can clean up."""
        self.process.kill()
        self.process.wait()


def lines(stream) -> Callable[[], str]:
    """Return what gives the next line of a stream, empty at its end; fails when none comes in time."""
    read: queue.Queue[str] = queue.Queue()

    def follow() -> None:
        for line in stream:
            read.put(line)
        read.put("")

    threading.Thread(target=follow, daemon=True).start()
    return lambda: read.get(timeout=PATIENCE)


def machine_with(folder: Path, *gpus: str) -> str:
    """Return the PATH of a machine with these GPUs."""
    smi = folder / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("\n".join(["#!/bin/sh", *(f"echo {gpu}" for gpu in gpus)]))
    smi.chmod(0o755)
    return f"{smi.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def start(tmp_path):
    """Start a job on a machine with two GPUs that leases some of them."""
    path = machine_with(tmp_path, "GPU-a", "GPU-b")
    outside = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    started = []

    def run(count: int, **environment: str) -> Job:
        process = subprocess.Popen(
            [sys.executable, "-c", JOB, str(count)],
            cwd=ROOT,
            env={**outside, "PATH": path, "TMPDIR": str(tmp_path), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(Job(process))
        return started[-1]

    yield run
    for job in started:
        job.kill()


def test_two_jobs_get_a_gpu_each_and_the_third_waits_with_one_line(start):
    first, second = start(1), start(1)
    assert {first.says(), second.says()} == {"GPU-a\n", "GPU-b\n"}
    third = start(1)
    assert f"process {first.process.pid} in {ROOT}" in (line := third.complains())
    assert line.startswith("finetune: waiting for a GPU, used by process ")
    first.kill()
    assert third.says() in ("GPU-a\n", "GPU-b\n")


def test_a_job_on_several_gpus_waits_for_all_of_them_and_blocks_none_meanwhile(start):
    one = start(1)
    assert one.says() == "GPU-a\n"
    both = start(2)
    line = both.complains()
    assert line.endswith(f"waiting for a GPU, used by process {one.process.pid} in {ROOT}\n")
    other = start(1)
    assert other.says() == "GPU-b\n"
    other.kill()
    one.kill()
    assert both.says() == "GPU-a,GPU-b\n"


@pytest.mark.parametrize(
    ("visible", "got"), [("1", "GPU-b\n"), ("GPU-b", "GPU-b\n"), ("", "\n"), ("-1", "-1\n")]
)
def test_only_visible_gpus_are_leased(start, visible, got):
    assert start(1, CUDA_VISIBLE_DEVICES=visible).says() == got


def test_too_few_gpus_is_an_error_and_not_an_endless_wait(start):
    *_, last = iter(start(3).complains, "")
    assert last.endswith("finetune.num_processes is 3, but 2 GPUs are visible\n")


TRAINING = """    options = settings.finetune
    import time
    from pathlib import Path
    log, go = Path({log!r}), Path({go!r})
    log.open("a").write("begins\\n")
    while not go.exists():
        time.sleep(0.1)
    log.open("a").write("ends\\n")
"""


@pytest.fixture
def queued(project, tmp_path):
    """Two experiments of one queue on one GPU, two at a time; the files `go` and `log` beside them."""
    log, go = tmp_path / "log", tmp_path / "go"
    log.touch()
    code = TRAINING.format(log=str(log), go=str(go))
    project.replace("stages/finetune.py", "    options = settings.finetune\n", code)
    project.commit()
    path = os.pathsep.join([str(Path(sys.executable).parent), machine_with(tmp_path, "GPU-a")])
    environment = {**project.environment, "PATH": path, "TMPDIR": str(tmp_path)}

    def dvc(*words: str) -> None:
        command = [sys.executable, "-m", "dvc", *words]
        subprocess.run(command, cwd=project.root, env=environment, check=True)

    dvc("exp", "run", "--queue", "-S", "finetune.lr=1e-4,3e-4")
    dvc("queue", "start", "-j", "2")
    yield project
    go.touch()
    dvc("queue", "stop", "--kill")


@pytest.mark.slow
def test_jobs_of_a_queue_never_share_a_gpu(queued, tmp_path):
    """The first to train goes on only when the other one waits, so that without a lease they overlap."""
    log = tmp_path / "log"

    def printed() -> str:
        outputs = (queued.root / ".dvc/tmp/exps/run").glob("*/*.out")
        text = "".join(file.read_text(encoding="utf-8") for file in outputs)
        assert "ERROR:" not in text, text
        return text

    def have(*words: str) -> bool:
        return log.read_text().split() == [*words]

    wait_until(lambda: "waiting for a GPU" in printed() or have("begins", "begins"), seconds=900)
    assert have("begins")
    (tmp_path / "go").touch()
    wait_until(lambda: printed() and have(*["begins", "ends"] * 2), seconds=900)
