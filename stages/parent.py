"""A stage dies with the `dvc repro` that started it.

A killed `dvc repro` would otherwise leave the stage writing into the next run's outputs. `stages/__init__.py`
asks for it before anything large is imported: imports take seconds, and a kill may come then.
"""

import ctypes
import signal
import sys


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
