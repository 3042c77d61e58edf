"""Where a stage's files lie: the default adapter's in the folders that dvc.yaml names first, those of
a named adapter (conf/adapters) in folders of its own beside them.

    LAB_ADAPTER=mine python -m stages.finetune    # models/adapters/mine/adapter, not models/adapter

A process works on one adapter, which the environment names, so that the processes it starts (one per
GPU) work on the same.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "LAB_ADAPTER"


def adapter_name() -> str | None:
    """Return the named adapter that this process works on, None for the default one."""
    return os.environ.get(VARIABLE) or None


def place(path: str, adapter: str | None = None) -> Path:
    """Return where an adapter keeps a file that the default one keeps at `path`.

    models/adapter becomes models/adapters/mine/adapter; without an adapter it is this process's own.
    """
    name = adapter or adapter_name()
    top, _, below = path.partition("/")
    return Path(top, "adapters", name, below) if name else Path(path)
