"""Checkpoints of an unfinished training: kept for a run of the same inputs, cleared for any other."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
import yaml

from stages.core.settings import Finetune


def keep_or_clear(folder: Path, wanted: str) -> None:
    """Keep the checkpoints that a killed run with the same fingerprint left, clear others.

    They live outside DVC's outputs, which DVC removes before it starts the stage.
    """
    mark = folder / "fingerprint"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark.write_text(wanted, encoding="utf-8")


def last_complete(folder: Path) -> str | None:
    """Return the newest checkpoint whose last file, the trainer's state, was written to its end."""
    steps = {int(f.name.rpartition("-")[2]): f for f in folder.glob("checkpoint-*")}
    for _, checkpoint in sorted(steps.items(), reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint, ignore_errors=True)
        else:
            return str(checkpoint)
    return None


def fingerprint(options: Finetune) -> str:
    """Return a sha256 over the settings and over all that dvc.yaml has finetune depend on."""
    digest = hashlib.sha256(f"{options.model_dump_json()} torch {torch.__version__}".encode())
    stage = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]["finetune"]
    for path in map(Path, stage["deps"]):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
