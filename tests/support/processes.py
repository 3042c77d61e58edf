"""Commands that tests start: their output, and waiting for what they do."""

from __future__ import annotations

import contextlib
import subprocess
import time

import psutil
import pytest

HANGS = 1200  # seconds after which a command is held to hang: ten times what one takes on a busy machine


def output_of(process: subprocess.Popen, says: str | None = None) -> str:
    """Return what a command printed until it ended; one that hangs is killed with its children."""
    try:
        return process.communicate(says, timeout=HANGS)[0]
    except subprocess.TimeoutExpired:
        family = psutil.Process(process.pid)
        for member in [*family.children(recursive=True), family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        pytest.fail(f"{process.args}: not done after {HANGS} s\n{process.communicate()[0]}")


def wait_until(happens, seconds: float = 300):
    """Wait for something to happen and return it; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not (result := happens()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
    return result
