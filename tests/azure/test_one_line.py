"""What can be wrong with a machine ends in one line, not in a traceback."""

import email.utils
import subprocess
import time

import pytest

from lab import doctor
from lab.git import git_output
from stages.core.errors import UserError
from support.blob_service import lab

pytestmark = pytest.mark.azure


def does(monkeypatch, outcome) -> None:
    """Let every command that is run end like this."""

    def run(words, **_):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)


SILENT = subprocess.CompletedProcess([], returncode=9, stdout="", stderr="")


@pytest.mark.parametrize("check", [doctor.gpu, doctor.settings, lambda: git_output("tag")])
def test_a_command_that_fails_without_a_word(check, monkeypatch):
    does(monkeypatch, SILENT)
    with pytest.raises(UserError, match="exit code 9, without a word"):
        check()


def test_a_driver_that_hangs(monkeypatch):
    does(monkeypatch, subprocess.TimeoutExpired("nvidia-smi", 10))
    with pytest.raises(UserError, match="nvidia-smi does not answer: the driver hangs"):
        doctor.gpu()


@pytest.mark.parametrize("check", [doctor.disk, doctor.links, doctor.sign_in])
def test_the_doctor_outside_a_repository(check, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not inside of a DVC repository"):
        check()


def test_a_remote_without_an_account(made, tmp_path):
    clone = made.copy(tmp_path / "clone")
    clone.dvc("remote", "default", "azure")
    said = lab(clone, "run", exits=1)
    assert "the remote is not set up: `lab remote setup`" in said
    assert "Traceback" not in said


def test_a_clock_that_is_wrong_is_found_in_a_refusal(monkeypatch):
    an_hour_ago = email.utils.formatdate(time.time() - 3600, usegmt=True)
    monkeypatch.setattr(doctor, "HEARD", {"Date": an_hour_ago})
    with pytest.raises(UserError, match="s off the remote's: Azure will refuse signatures"):
        doctor.clock()


def test_a_cache_that_cannot_be_written(laptop, tmp_path):
    (tmp_path / "file").touch()
    with (laptop.root / ".dvc/config.local").open("a") as settings:
        settings.write(f"[cache]\n    dir = {tmp_path}/file/cache\n")
    fault = f"DVC's cache {tmp_path}/file/cache cannot be written: Not a directory"
    assert fault in lab(laptop, "doctor", exits=1)
    assert fault in lab(laptop, "run", exits=1)
