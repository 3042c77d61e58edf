"""A stage dies with the `dvc` that started it, and so does whatever the stage itself started.

A killed `dvc repro` would otherwise leave the stage writing into the next run's outputs. The kernel's
parent-death signal is not enough: some shells (dash, CI's and containers' /bin/sh) stay between DVC and the
stage, and live on. So a thread waits for DVC itself. `stages/__init__.py` starts it before anything large is
imported: imports take seconds, and a kill may come then.
"""

from __future__ import annotations

import contextlib
import os
import sys
from threading import Thread

import psutil


def die_with_dvc() -> None:
    """End this process and its children as soon as the DVC that runs this stage has ended."""
    if "DVC_STAGE" not in os.environ:
        return
    dvc = starter(psutil.Process())
    if dvc is None:
        sys.exit("the dvc that started this stage is gone: run dvc repro again")
    Thread(target=end_after, args=(dvc,), daemon=True).start()


def starter(process: psutil.Process) -> psutil.Process | None:
    """Return the nearest ancestor without the variable that DVC gives to its stages; None for an orphan."""
    for ancestor in process.parents():
        if "DVC_STAGE" not in environment_of(ancestor):
            return None if adopts_orphans(ancestor) else ancestor
    return None


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Return a process's environment, empty if it belongs to another user."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


def adopts_orphans(process: psutil.Process) -> bool:
    """Say whether this is init rather than a DVC that a container runs as its first process."""
    return process.pid == 1 and not any("dvc" in word for word in process.cmdline())


def end_after(dvc: psutil.Process) -> None:
    """Wait for DVC, then kill this process's children and itself."""
    dvc.wait()  # however it ends: a SIGKILL runs no handler, which is why this thread exists
    me = psutil.Process()
    for process in [*me.children(recursive=True), me]:
        with contextlib.suppress(psutil.Error):
            process.kill()
