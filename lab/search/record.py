"""What has run already, and what it gave: DVC's run cache, and the dvc.lock of every experiment.

record.trace(params)          # every stage that settings would find done, with its outputs
record.early(traced)          # the metrics that these outputs decide: a size after optimize, not evaluate

A stage's run is known by its command, its settings and the hashes of what it reads. So what a point shares
with earlier runs is seen without starting DVC, and nothing but DVC's own files remembers it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx
from dvc.repo import Repo
from dvc.utils.serialize import YAMLFileCorruptedError, load_yaml

from lab.experiments.edits import DIGEST
from stages.core.errors import UserError
from stages.core.files import read_json
from stages.params import Values, flat
from stages.report import quality_and_size

RAW = "metrics/raw/"
Entry = Mapping[str, Any]  # a stage of dvc.lock
Outs = dict[str, Entry]  # an output's path: its hash and size


class Record:
    """The pipeline of a commit, and the runs of its stages that are known."""

    def __init__(self, lock: Mapping[str, Entry], metrics: Mapping[str, float]) -> None:
        """Begin with a commit's dvc.lock and metrics. Raises `UserError` where a stage never ran."""
        self.lock = lock
        with Repo() as repo:
            graph = repo.index.graph
            # DVC's graph points from a stage to what it needs
            self.needs = {s.name: {n.name for n in networkx.descendants(graph, s)} for s in graph}
            # as dvc.yaml has them, but none before what it needs
            written = [stage.name for stage in repo.index.stages if stage.name in self.needs]
            ordered = networkx.lexicographical_topological_sort(
                graph.reverse(), key=lambda stage: written.index(stage.name)
            )
            self.stages = [stage.name for stage in ordered]
            self._in_cache = {str(out) for out in repo.index.outs if out.use_cache}
            self._place = repo.cache.local.oid_to_path
            self._runs_folder = Path(repo.cache.legacy.path, "runs")
        self._runs: dict[str, Outs] = {}
        self._read: set[Path] = set()
        self.learn(lock)
        self.refresh()
        self.decides = self._first_stages(metrics)

    def learn(self, lock: Mapping[str, Entry]) -> None:
        """Take up the runs that a dvc.lock names."""
        for entry in lock.values():
            self._runs[key_of(entry, settings_of(entry), hashes_of(entry))] = outs_of(entry)

    def refresh(self) -> None:
        """Take up what came into the run cache since."""
        for file in self._runs_folder.glob("*/*/*"):
            if (
                file in self._read or len(file.name) != 64
            ):  # a file that is being written has another name
                continue
            try:
                entry = load_yaml(file)
            except (YAMLFileCorruptedError, FileNotFoundError):
                continue  # DVC removes it when it meets it
            self._read.add(file)
            if isinstance(entry, dict):
                self.learn({"": entry})

    def trace(self, params: Values, *, here: bool = False) -> dict[str, Outs]:
        """Return the stages that have run with these settings, each with its outputs.

        With `here` only those whose outputs DVC's cache has, so that they would not run again.
        """
        traced: dict[str, Outs] = {}
        for stage in self.stages:
            entry = self.lock.get(stage, {})
            if not self.needs[stage] <= traced.keys():
                continue
            made = {path: out for outs in traced.values() for path, out in outs.items()}
            hashes = {
                path: made.get(path, {"md5": md5}).get("md5")
                for path, md5 in hashes_of(entry).items()
            }
            key = key_of(entry, watched(entry, params), hashes)
            outs = self._runs.get(key)
            if outs is not None and not (here and self._is_lost(outs)):
                traced[stage] = outs
        return traced

    def early(self, traced: Mapping[str, Outs]) -> dict[str, float]:
        """Return the metrics that the outputs of some stages decide."""
        found: dict[str, float] = {}
        for stage, outs in traced.items():
            for path, out in outs.items():
                metrics = self._metrics_of(path, out).items()
                found |= {k: value for k, value in metrics if self.decides.get(k) == stage}
        return found

    def _is_lost(self, outs: Outs) -> bool:
        """Say whether DVC's cache lacks some of a stage's outputs."""
        kept = [out["md5"] for path, out in outs.items() if path in self._in_cache and "md5" in out]
        return not all(Path(self._place(md5)).exists() for md5 in kept)

    def is_whole(self, lock: Mapping[str, Entry], params: Values) -> bool:
        """Say whether a dvc.lock is of one complete run with these settings.

        An experiment of some stages alone has the baseline's entries, and metrics, for all others.
        """
        made = {path: out["md5"] for entry in lock.values() for path, out in outs_of(entry).items()}
        return lock.keys() >= self.lock.keys() and all(
            comparable(watched(entry, params)) == comparable(settings_of(entry))
            and all(made.get(path, md5) == md5 for path, md5 in hashes_of(entry).items())
            for entry in lock.values()
        )

    def _metrics_of(self, path: str, out: Entry) -> dict[str, float]:
        """Return the metrics that an output holds, or whose size is one."""
        if path.startswith("models/") and "size" in out:
            return quality_and_size({f"bytes_{Path(path).name}": out["size"]})[1]
        if not (path.startswith(RAW) and path.endswith(".json")):
            return {}
        # the workspace has the commit's own where its cache was emptied
        places = [
            Path(self._place(out["md5"])),
            *([Path(path)] if self._is_here(path, out) else []),
        ]
        file = next((place for place in places if place.is_file()), None)
        return metrics_in(read_json(file)) if file else {}

    def _is_here(self, path: str, out: Entry) -> bool:
        return any(outs_of(e).get(path, {}).get("md5") == out["md5"] for e in self.lock.values())

    def _first_stages(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return the first stage that makes each metric, as far as the commit's own figures prove it."""
        found: dict[str, str] = {}
        for stage, outs in self.trace_of_commit().items():
            for path, out in outs.items():
                for name, value in self._metrics_of(path, out).items():
                    if metrics.get(name) == value:
                        found.setdefault(name, stage)
        return found

    def trace_of_commit(self) -> dict[str, Outs]:
        """Return all stages with the commit's outputs. Raises `UserError` for one that never ran."""
        if missing := [stage for stage in self.stages if stage not in self.lock]:
            raise UserError(f"dvc.lock lacks {missing[0]}: `dvc repro`, then commit")
        return {stage: outs_of(self.lock[stage]) for stage in self.stages}


def metrics_in(raw: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that a raw file of a stage holds, by the names that `report` gives them."""
    numbers = {
        k: v for k, v in raw.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    quality, size = quality_and_size(numbers)
    curve = raw.get("validation")
    if isinstance(curve, list) and curve and "loss" in curve[-1]:
        quality["validation_loss"] = curve[-1]["loss"]
    return quality | size


def key_of(entry: Entry, settings: Values, hashes: Mapping[str, Any]) -> str:
    """Return what makes a run of a stage the same run."""
    # the outputs too: two stages may have one command
    named = [entry.get("cmd"), comparable(settings), sorted(hashes.items()), sorted(outs_of(entry))]
    return json.dumps(named, sort_keys=True, default=str)


def comparable(values: Values) -> Values:
    """Return settings with 32 and 32.0 alike, as DVC has them."""
    return {
        key: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for key, value in values.items()
    }


def settings_of(entry: Entry) -> Values:
    """Return the settings that a stage ran with, by dotted names, without the digest of conf/."""
    settings = flat((entry.get("params") or {}).get("params.yaml") or {})
    return {key: value for key, value in settings.items() if key != DIGEST}


def watched(entry: Entry, params: Values) -> Values:
    """Return the settings that a stage watches."""
    names = [*((entry.get("params") or {}).get("params.yaml") or {})]
    return {
        key: value
        for key, value in params.items()
        if key != DIGEST and any(key == name or key.startswith(f"{name}.") for name in names)
    }


def hashes_of(entry: Entry) -> dict[str, Any]:
    """Return the hashes of what a stage reads."""
    return {dep["path"]: dep.get("md5") for dep in entry.get("deps") or []}


def outs_of(entry: Entry) -> Outs:
    """Return the outputs of a stage's run."""
    return {out["path"]: out for out in entry.get("outs") or []}
