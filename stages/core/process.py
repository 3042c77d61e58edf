"""How the process of a stage begins, before anything large is imported.

begin()  # by stages/__init__.py, where `python -m stages.quantize` starts
"""

from __future__ import annotations

import gc
import signal
import sys
import time

from stages.core.machine import use_one_gpu
from stages.core.parent import die_with_dvc

STARTED = time.monotonic()
chosen_gpu = ""  # which of several this stage uses, in words


def begin() -> None:
    """Make the process die with its DVC, see one GPU, and end quietly at Ctrl-C while it imports."""
    global chosen_gpu  # noqa: PLW0603  # one process, one stage
    die_with_dvc()
    chosen_gpu = use_one_gpu()
    gc.disable()  # what is imported stays to the end: `run` turns it on again
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
