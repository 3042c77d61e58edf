"""The tiny pipeline, killed twenty times on the way: the rerun ends where an undisturbed run does."""

import contextlib
import random
import signal
import sys

import psutil
import pytest
import yaml

from support.processes import wait_until
from support.project import Project, left_behind

pytestmark = [pytest.mark.azure, pytest.mark.slow, pytest.mark.longest]
LONG = ["fetch", "quantize", "finetune", "optimize", "evaluate"]  # take seconds of CPU time
TIMED = "metrics/speed"  # what dvc.lock says of files in there differs from run to run


def test_a_run_from_clean_with_twenty_kills_gives_the_lock_of_an_undisturbed_one(fresh, request):
    dice = random.Random(20)
    for stage in [stage for stage in LONG for _ in range(4)]:
        killed_after(fresh, stage, dice.uniform(0, 3))
    fresh.dvc("repro")
    undisturbed = request.getfixturevalue("finished")  # another worker made it meanwhile
    assert untimed(fresh) == untimed(undisturbed)
    assert left_behind(fresh) == []


def killed_after(project: Project, stage: str, delay: float) -> None:
    """Run the pipeline; kill it `delay` seconds after a stage begins, or a later one if that is done.

    They are seconds of CPU time, so that a busy machine kills no earlier.
    """
    log = project.root.with_name("killed.log")
    begins = [f"Running stage '{later}'" for later in LONG[LONG.index(stage) :]]
    with log.open("w") as stdout:
        run = project.start(sys.executable, "-m", "dvc", "repro", stdout=stdout)
    wait_until(lambda: any(words in log.read_text() for words in begins))
    deadline = cpu_seconds(run.pid) + delay
    wait_until(lambda: cpu_seconds(run.pid) > deadline)
    run.kill()
    assert run.wait() == -signal.SIGKILL


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process and those that it started have used."""
    run, total = psutil.Process(pid), 0.0
    for member in [run, *run.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            times = member.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def untimed(project: Project) -> dict:
    """Return dvc.lock's stages without what it says of timings, and of the reports made of them."""
    stages = yaml.safe_load((project.root / "dvc.lock").read_text())["stages"]
    reports = ("metrics/speed.json", "metrics/costs.json", "metrics/plots/tradeoff.json")
    for stage in stages.values():
        for kind in ("deps", "outs"):
            stage[kind] = [
                entry
                for entry in stage.get(kind, [])
                if not entry["path"].startswith((TIMED, *reports))
            ]
    return stages
