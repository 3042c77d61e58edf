"""How the process of a stage begins, before anything large is imported.

begin()  # by stages/__init__.py, where `python -m stages.quantize` starts
"""

from __future__ import annotations

import gc
import signal
import sys
import time

from stages.core import ranks
from stages.core.machine import use_one_gpu, visible_gpus
from stages.core.parent import die_with_dvc

STARTED = time.monotonic()
# the others wait for no GPU: the guard is a commit hook, too
USE_A_GPU = {f"stages.{name}" for name in ("fetch", "quantize", "finetune", "optimize", "evaluate")}
chosen_gpu = ""  # which of several this stage uses, in words
gpus: list[str] = []  # all that it may use


def begin() -> None:
    """Make the process die with its DVC, see one GPU, and end quietly at Ctrl-C while it imports."""
    global chosen_gpu, gpus  # noqa: PLW0603  # one process, one stage
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
    if ranks.place():  # its stage has chosen the GPU
        ranks.end_with_the_stage()
    else:
        die_with_dvc()
        gpus = visible_gpus()
        chosen_gpu = use_one_gpu(alone=not USE_A_GPU.isdisjoint(sys.orig_argv))
    gc.disable()  # what is imported stays to the end: `run` turns it on again
