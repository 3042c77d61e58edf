"""The stages of the pipeline, one module each, named like the DVC stage that runs it.

Behind them lie rooms, one subject each (docs/architecture.md). Importing this package turns telemetry off
before any library can read its switch. Where a stage starts, it also begins the stage's process, and keeps
the model hub for the stage that fetches: PEFT asks it about every base model that it saves an adapter of.
"""

import os
import sys

from stages.core.process import begin

for _switch in (
    "DO_NOT_TRACK",
    "HF_HUB_DISABLE_TELEMETRY",
    "OLIVE_DISABLE_TELEMETRY",
    "ORT_DISABLE_TELEMETRY",
):
    os.environ.setdefault(_switch, "1")
if sys.argv[0] == "-m":  # `python -m stages.quantize`: Python is still looking for the module
    if "stages.fetch" not in sys.orig_argv:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    begin()
