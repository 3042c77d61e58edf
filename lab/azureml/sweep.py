"""A sweep's combinations, and the stages that they have in common and so compute once."""

from __future__ import annotations

from typing import Any

import networkx
import yaml
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.hydra import get_hydra_sweeps, to_hydra_overrides
from hydra.errors import HydraException

from lab.review.revisions import WORKSPACE, Revision, flat
from lab.review.stages import out_of_date
from stages.core.errors import UserError
from stages.params import compose

GUARD = "params"


def combinations(sweeps: list[str]) -> list[list[str]]:
    """Return the overrides of every combination: KEY=A,B and OTHER=C,D make four."""
    try:
        return [found["params.yaml"] for found in get_hydra_sweeps({"params.yaml": sweeps})]
    except (HydraException, DvcException) as error:
        raise UserError(f"--sweep: {' '.join(str(error).split())}") from None


def check(overrides: list[str]) -> None:
    """Raise `UserError` where a value of -S is a sweep."""
    for override in to_hydra_overrides(overrides):
        if override.is_sweep_override():
            raise UserError(f"-S {override.input_line} has several values: give it with --sweep")


def common_work(combined: list[list[str]]) -> list[str]:
    """Return the stages that are the same in all combinations and out of date, in order."""
    params = [flat(yaml.safe_load(compose(overrides))) for overrides in combined]
    lock = Revision(WORKSPACE).lock
    stale = {stage.stage for stage in out_of_date()}
    with Repo() as repo:
        graph = repo.index.graph
        varying = [stage for stage in repo.index.stages if len(set(seen_by(stage, params))) > 1]
        # DVC's graph points from a stage to what it needs: its ancestors there are the stages after it
        after = {later for stage in varying for later in networkx.ancestors(graph, stage)}
        common = [s for s in repo.index.stages if s not in {*varying, *after} and s.name != GUARD]
        todo = {s for s in common if s.name in stale or differs(s, params[0], lock)}
        todo |= {later for stage in todo for later in networkx.ancestors(graph, stage)}
        return [stage.name for stage in common if stage in todo]


def seen_by(stage: Any, params: list[dict[str, Any]]) -> list[str]:
    """Return what a stage sees of each combination's parameters."""
    return [str({k: v for k, v in values.items() if watches(stage, k)}) for values in params]


def differs(stage: Any, params: dict[str, Any], lock: dict[str, Any]) -> bool:
    """Say whether dvc.lock has other values of the parameters that a stage watches."""
    known = flat(lock.get(stage.name, {}).get("params", {}).get("params.yaml", {}))
    return any(known.get(key) != value for key, value in params.items() if watches(stage, key))


def watches(stage: Any, key: str) -> bool:
    """Say whether a parameter is an input of a stage."""
    watched = [name for dep in stage.params for name in getattr(dep, "params", [])]
    return any(key == name or key.startswith(f"{name}.") for name in watched)
