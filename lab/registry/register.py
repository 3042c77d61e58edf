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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lab.azureml import workspace
from lab.azureml.datastore import Datastore, sha256
from lab.git import git_output
from lab.review.gates import judge
from lab.review.revisions import WORKSPACE, Revision
from lab.review.stages import out_of_date
from stages.core import azure
from stages.core.errors import UserError
from stages.core.files import in_megabytes
from stages.core.settings import load

if TYPE_CHECKING:
    from azure.ai.ml import MLClient

NAME = "ft-for-travel"
FOLDERS = ("onnx", "onnx_adapter")  # of models/, and of a version
SECTIONS = ("model", "data", "quantize", "finetune", "optimize")  # what makes a model what it is
TAG_LENGTH = 1000  # Azure ML's limit for a tag's value


@dataclass(frozen=True)
class Release:
    """What is registered: files by their names in the version, their hash, and what is said of them."""

    files: dict[str, Path]
    content: str
    tags: dict[str, str]

    @property
    def size(self) -> str:
        return in_megabytes(sum(file.stat().st_size for file in self.files.values()))


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
        git.register(name, version, release.tags)
    else:
        register_in_azure(place.connect(), name, version, release)


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
    files = {}
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
    """Return the metrics of quality and size; speed is the machine's as much as the model's."""
    files = (f"metrics/{name}.json" for name in ("quality", "size"))
    found = {key: value for file in files for key, value in head.parse(file, json.loads).items()}
    return {key: value for key, value in found.items() if isinstance(value, (int, float))}


def register_in_azure(client: MLClient, name: str, version: int | None, release: Release) -> None:
    """Send the files and create the version, unless it is there."""
    number = choose_version(client, name, version, release.content)
    if number is None:
        return
    from azure.ai.ml.entities import Model

    store = Datastore(client)
    prefix = f"models/{name}/{release.content}"
    print(f"Sending {release.size} to {store.uri(prefix)}")
    store.upload(release.files, prefix)
    model = Model(
        name=name,
        version=str(number),
        path=store.uri(prefix),
        type="custom_model",
        tags=release.tags,
        description="ONNX Runtime GenAI model (onnx/) with its LoRA adapter (onnx_adapter/)",
    )
    with azure.in_words():
        client.models.create_or_update(model)
    print(f"Registered {name} version {number}: az ml model download -n {name} -v {number}")


def choose_version(client: MLClient, name: str, wanted: int | None, content: str) -> int | None:
    """Return the version to create; None when the content is registered. Refuses to overwrite."""
    from azure.ai.ml.constants import ListViewType

    with azure.in_words():  # archived versions keep their numbers
        models = client.models.list(name, list_view_type=ListViewType.ALL)
        listed = {model.version: dict(model.tags or {}) for model in models}
    contents = {version: tags.get("content_sha256") for version, tags in listed.items()}
    if wanted is None:
        same = [version for version, known in contents.items() if known == content]
    else:
        same = [str(wanted)] if contents.get(str(wanted)) == content else []
    if same:
        print(f"{name} version {same[0]} holds this very content: nothing to do")
        return None
    following = max((int(version) for version in listed if version.isdigit()), default=0) + 1
    if wanted is not None and str(wanted) in listed:
        raise UserError(
            f"{name} version {wanted} exists and holds another model: bump the version, --version {following}"
        )
    return wanted or following
