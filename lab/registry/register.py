"""Register the model and its adapter as one version: in Azure ML, or without Azure in git.

lab register                                  # the next version of ft-for-travel
lab register --name ft-for-food --version 3
lab register --git                            # gto tags, even where a workspace is known

Registering the same content again is a no-op. Other content under a version that exists is refused before
anything is sent. What arrived before an interruption is not sent again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import typer

from lab.azureml import workspace
from lab.azureml.datastore import sha256
from lab.git import git_output
from lab.registry import azure_ml, git_tags
from lab.registry.release import Release
from lab.review.gates import judge
from lab.review.revisions import WORKSPACE, Revision
from lab.review.stages import out_of_date
from stages.core.errors import UserError
from stages.core.settings import load

NAME = "ft-for-travel"
FOLDERS = ("onnx", "onnx_adapter")  # of models/, and of a version
SECTIONS = ("model", "data", "quantize", "finetune", "optimize")  # what makes a model what it is
TAG_LENGTH = 1000  # Azure ML's limit for a tag's value


def register(
    name: Annotated[str, typer.Option(help="The model's name.")] = NAME,
    version: Annotated[
        int | None, typer.Option(min=1, help="Its version [default: the next].")
    ] = None,
    git: Annotated[bool, typer.Option("--git", help="In git (gto tags), not in Azure ML.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Despite uncommitted changes, failing gates, stale stages."),
    ] = False,
) -> None:
    """Register the model and its adapter. As a version, with commit, parameters and metrics."""
    problems = find_problems()
    if problems and not force:
        raise UserError(f"not registered: {'; '.join(problems)} (--force registers all the same)")
    release = prepare(problems)
    if git or (place := workspace.find()) is None:
        git_tags.register(name, version, release.tags)
    else:
        azure_ml.register(place.connect(), name, version, release)


def find_problems() -> list[str]:
    """Say what speaks against registering: uncommitted changes, failing gates, stages out of date."""
    problems = []
    if git_output("status", "--porcelain", "--untracked-files=no"):
        problems.append("there are uncommitted changes: commit them")
    head = Revision(WORKSPACE)
    for verdict in judge(load().evaluate.gates, {}, head.metrics, {}):
        if not verdict.passed:
            problems.append(f"gate {verdict.metric}: {verdict.reason}")
    if stale := [stage.stage for stage in out_of_date()]:
        problems.append(f"out of date: {', '.join(stale)}: run dvc repro")
    return problems


def prepare(problems: list[str]) -> Release:
    """Gather the files and what is said of them."""
    files: dict[str, Path] = {}
    for folder in FOLDERS:
        found = sorted(f for f in Path("models", folder).rglob("*") if f.is_file())
        if not found:
            raise UserError(f"models/{folder} is not here: dvc pull models/{folder} brings it")
        files |= {file.relative_to("models").as_posix(): file for file in found}
    content = sha256(files)
    return Release(files, content, describe(content, problems))


def describe(content: str, problems: list[str]) -> dict[str, str]:
    """Return the tags of a version: where it comes from, how it was made, how good it is."""
    head, lock = Revision(WORKSPACE), Path("dvc.lock")
    if not lock.exists():
        raise UserError("no dvc.lock here, which says how the model was made: run dvc repro first")
    params = json.loads(load().model_dump_json())
    tags = {
        "content_sha256": content,
        "git_commit": git_output("rev-parse", "HEAD"),
        "dvc_lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest(),
        **{section: json.dumps(params[section]) for section in SECTIONS},
        **{key: f"{value:g}" for key, value in measured(head).items()},
    }
    if problems:
        tags["registered_despite"] = "; ".join(problems)
    return {key: value[:TAG_LENGTH] for key, value in tags.items()}


def measured(head: Revision) -> dict[str, float]:
    """Return the version's own metrics of quality and size.

    Speed is the machine's as much as the model's, and what ends in _base is of no version: Azure ML takes 50
    tags at most.
    """
    files = (f"metrics/{name}.json" for name in ("quality", "size"))
    found = {key: value for file in files for key, value in head.parse(file, json.loads).items()}
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, (int, float)) and not key.endswith("_base")
    }
