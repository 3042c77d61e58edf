"""The tiny pipeline, killed twenty times on the way: the rerun ends where an undisturbed run does."""

import random
import subprocess
import sys

import psutil
import pytest
import yaml
from conftest import Project, left_behind, wait_until

pytestmark = [pytest.mark.azure, pytest.mark.slow, pytest.mark.longest]
TIMED = "metrics/speed"  # what dvc.lock says of files in there differs from run to run


def test_a_run_from_clean_with_twenty_kills_gives_the_lock_of_an_undisturbed_one(fresh, request):
    """Moments are drawn in seconds of CPU time, so that a busy machine draws them no earlier."""
    dice = random.Random(20)
    for _ in range(20):
        process = fresh.start(sys.executable, "-m", "dvc", "repro", stdout=subprocess.DEVNULL)
        budget = dice.uniform(0.5, 8)
        wait_until(lambda: cpu_seconds(process.pid) > budget or process.poll() is not None)  # noqa: B023
        process.kill()
        process.wait()
    fresh.dvc("repro")
    undisturbed = request.getfixturevalue("finished")  # another worker made it meanwhile
    assert untimed(fresh) == untimed(undisturbed)
    assert left_behind(fresh) == []


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process and those that it started have used, 0 once it has ended."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        times = [member.cpu_times() for member in family]
    except psutil.NoSuchProcess:
        return 0.0
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


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
