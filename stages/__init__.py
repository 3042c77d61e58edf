"""The stages of the pipeline, one module each, named like the DVC stage that runs it.

Importing this package turns telemetry off before any library can read its switch, and keeps the model hub
for the stage that fetches: PEFT asks it about every base model that it saves an adapter of. A stage
dies with the DVC that runs it, and sees one GPU. It looks for no garbage among what it imports, see
`running.run`.
"""

import gc
import os
import signal
import sys
import time

from stages.core.machine import use_one_gpu
from stages.core.parent import die_with_dvc

STARTED = time.monotonic()
GPU = ""  # which of several this stage uses
if sys.argv[0] == "-m":  # `python -m stages.quantize`: Python is still looking for the module
    die_with_dvc()
    GPU = use_one_gpu()
    gc.disable()
    # while it imports, too, Ctrl-C ends it with one word
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
for _switch in (
    "DO_NOT_TRACK",
    "HF_HUB_DISABLE_TELEMETRY",
    "OLIVE_DISABLE_TELEMETRY",
    "ORT_DISABLE_TELEMETRY",
):
    os.environ.setdefault(_switch, "1")
if "stages.fetch" not in sys.orig_argv:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
