"""Which stages are out of date: dvc.lock against code, parameters and data.

Like `dvc status`, but what was never pulled is taken at dvc.lock's word: a stage is out of date when
something that git tracks differs from dvc.lock, or when dvc.lock disagrees with itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import Stage

from stages.core.errors import UserError


@dataclass(frozen=True)
class OutOfDate:
    """A stage that `dvc repro` would run, why, and the stages that may have to follow."""

    stage: str
    reasons: list[str]
    followers: list[str]


def out_of_date() -> list[OutOfDate]:
    """Return the stages whose inputs or results are not what dvc.lock says."""
    try:
        with Repo() as repo:
            made = {out.fs_path: out for out in repo.index.outs}
            found = [(stage, reasons(stage, made)) for stage in repo.index.stages]
            return [
                OutOfDate(stage.addressing, why, followers(repo, stage))
                for stage, why in found
                if why
            ]
    except DvcException as error:
        raise UserError(f"DVC cannot read the pipeline: {error}") from None


def reasons(stage: Stage, made: dict) -> list[str]:
    """Say in words what of a stage changed since dvc.lock was written."""
    if not any(dep.hash_info for dep in stage.deps):
        return ["it never ran"]
    changed = ["its command changed"] if stage.changed_stage() else []
    for dep in stage.deps:
        producer = made.get(dep.fs_path)
        if producer and producer.use_cache and dep.hash_info != producer.hash_info:
            changed.append(f"{dep} is another one than dvc.lock says it used")
        elif not (producer and producer.use_cache):
            changed += described(dep.status())
    for out in stage.outs:
        states = out.status()
        changed += described(states) if not (out.use_cache and is_missing(states)) else []
    return changed


def is_missing(states: dict) -> bool:
    """Say whether an output is only not here: never pulled, or removed."""
    return set(states.values()) <= {"deleted", "not in cache"}


def described(states: dict) -> list[str]:
    """Put DVC's states (path: modified, or params.yaml: {key: modified}) into words."""
    words = []
    for path, state in states.items():
        if isinstance(state, dict):
            words += [f"{key} {_in_words(value)}" for key, value in state.items()]
        else:
            words.append(f"{path} {_in_words(state)}")
    return words


def followers(repo: Repo, stage: Stage) -> list[str]:
    """Return the stages that come after one, in the order of dvc.yaml."""
    after = networkx.ancestors(repo.index.graph, stage)
    return [other.addressing for other in repo.index.stages if other in after]


def _in_words(state: object) -> str:
    return {"deleted": "is missing", "new": "is new"}.get(str(state), "changed")
