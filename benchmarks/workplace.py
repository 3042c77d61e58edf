"""Stages in a folder of their own, with other settings than the workspace's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from stages.core.files import read_json
from stages.params import compose


def write_params(folder: Path, *overrides: str) -> None:
    """Compose conf/ with overrides into the folder's params.yaml; a copy of conf/ says that it is current."""
    shutil.copytree(ROOT / "conf", folder / "conf", dirs_exist_ok=True)
    shutil.copy(ROOT / "dvc.yaml", folder)  # what finetune's checkpoints depend on
    (folder / "params.yaml").write_text(compose(overrides, ROOT / "conf"), encoding="utf-8")


def run_stage(name: str, folder: Path) -> dict[str, Any]:
    """Run a stage as DVC does; return its wall-clock seconds, imports included, and what it reports."""
    started = time.monotonic()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", f"stages.{name}"]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    cost = {"wall_seconds": round(time.monotonic() - started, 1)}
    file = folder / f"metrics/speed/{name}.json"
    return cost | (read_json(file) if file.exists() else {})  # report has no costs of its own
