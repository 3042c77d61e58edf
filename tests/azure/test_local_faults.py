"""A full disk, two runs at once, a killed run: clear, and nothing lost or wrongly accepted."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.blob_service import Container, lab, settings, start, wait_until
from support.processes import output_of

pytestmark = pytest.mark.azure
IN_SMALL_CACHE = """
mount -t tmpfs -o size=3m tmpfs .dvc/cache || exit 99
{python} -m lab.cli dvc pull; code=$?
cp -r .dvc/cache {kept}
exit $code
"""


def can_mount() -> bool:
    """Say whether this machine lets us make a small file system."""
    words = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return (
        bool(shutil.which("unshare")) and subprocess.run(words, capture_output=True).returncode == 0
    )


@pytest.mark.skipif(
    not (can_mount() or os.environ.get("CI")),  # there it fails, for a skip is seen by nobody
    reason="needs user namespaces, to mount a small file system",
)
def test_a_disk_that_fills_up_during_a_pull(colleague, tmp_path):
    (colleague.root / ".dvc/cache").mkdir()
    script = IN_SMALL_CACHE.format(python=sys.executable, kept=tmp_path / "kept")
    said = colleague.run("unshare", "-rm", "sh", "-c", script, exits=1)
    assert "the disk is full: free some space" in said
    kept = [file for file in (tmp_path / "kept/files/md5").glob("*/*") if file.suffix != ".tmp"]
    assert kept, "the disk was never written to"
    for file in kept:
        assert md5(file) == (file.parent.name + file.name).removesuffix(".dir")
    assert not (colleague.root / "models/base").exists()
    lab(colleague, "dvc", "pull")
    assert "up to date" in colleague.dvc("status")


def md5(file) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def test_two_machines_run_and_push_at_once(laptop, container: Container, tmp_path):
    other = container.connect(laptop.copy(tmp_path / "other"))
    for steps, machine in enumerate((laptop, other), start=2):
        (machine.root / "params.yaml").write_text(settings(steps))
    runs = [start(machine, "run") for machine in (laptop, other)]
    said = [output_of(run) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    for machine in (laptop, other):
        assert "0 of them" in lab(machine, "fsck", "--deep")


@pytest.fixture
def held(laptop) -> Iterator[Path]:
    """A file; while it exists, the first stage, which has to run again, does not end."""
    (laptop.root / "params.yaml").write_text(settings(steps=1, size=1000))
    hold = laptop.root / "hold"
    hold.touch()
    yield hold
    hold.unlink(missing_ok=True)


def test_two_runs_in_one_clone_do_not_disturb_each_other(laptop, held):
    first = start(laptop, "run")
    wait_until((laptop.root / "models/.base.tmp").exists, first)
    second = lab(laptop, "run", exits=1)
    assert "is busy" in second or "Unable to acquire lock" in second
    held.unlink()
    said = output_of(first)
    assert first.returncode == 0, said
    assert "0 of them" in lab(laptop, "fsck", "--deep")
    assert "up to date" in laptop.dvc("status")


def test_a_run_that_is_killed_takes_its_stage_along_and_runs_again(laptop, held):
    run = laptop.start(sys.executable, "-m", "dvc", "repro")
    wait_until((laptop.root / "models/.base.tmp").exists, run)
    children = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
    held.unlink()
    assert "Running stage 'make'" in lab(laptop, "run")
    assert not (laptop.root / "models/.base.tmp").exists()
    assert "0 of them" in lab(laptop, "fsck", "--deep")
