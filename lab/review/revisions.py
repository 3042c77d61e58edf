"""What a revision says about itself: parameters, metrics, answers, costs, as git tracks them."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.errors import UserError
from stages.params import flat

WORKSPACE = "workspace"
METRICS = ("metrics/quality.json", "metrics/size.json", "metrics/speed.json")
MAIN = ("origin/main", "main", "origin/HEAD", "master")  # what it may be called
FETCH_ALL = "this clone is shallow, `git fetch --unshallow` brings the commits before"


@dataclass(frozen=True)
class Revision:
    """A commit, or the files as they lie in the workspace."""

    name: str

    def read(self, path: str) -> str | None:
        """Return a file's text, None where the revision lacks it."""
        if self.name == WORKSPACE:
            return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else None
        shown = _git("show", f"{self.name}:./{path}")
        return shown.stdout if shown.returncode == 0 else None

    def json(self, path: str) -> Any:
        """Return a JSON file's value, an empty mapping where there is none."""
        return self.parsed(path, json.loads) or {}

    def parsed(self, path: str, parse: Callable[[str], Any]) -> Any:
        """Return what a file holds, None where there is none. Raises `UserError` where it is broken."""
        try:
            return parse(self.read(path) or "null")
        except (ValueError, yaml.YAMLError, OmegaConfBaseException):
            where = "here" if self.name == WORKSPACE else f"at {self.name}"
            raise UserError(
                f"{path} {where} cannot be read (are conflict marks of a merge in it?): "
                "mend it there, or compare with another commit: lab review BASE"
            ) from None

    @cached_property
    def params(self) -> dict[str, Any]:
        """Every parameter by its dotted name."""
        loaded = self.parsed(
            "params.yaml", lambda text: OmegaConf.to_container(OmegaConf.create(text))
        )
        params = flat(loaded or {})
        params.pop("conf_digest", None)
        return params

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Every metric by its name."""
        return {name: value for path in METRICS for name, value in flat(self.json(path)).items()}

    @cached_property
    def prompts(self) -> list[dict[str, Any]]:
        """Every test prompt with its answers and scores."""
        # not splitlines: an answer may hold U+2028 and its like
        lines = (self.read("metrics/predictions.jsonl") or "").split("\n")
        return self.parsed(
            "metrics/predictions.jsonl", lambda _: [json.loads(x) for x in lines if x]
        )

    @cached_property
    def lock(self) -> dict[str, Any]:
        """What dvc.lock says of every stage."""
        return (self.parsed("dvc.lock", yaml.safe_load) or {}).get("stages", {})

    def cost(self, stage: str) -> dict[str, float]:
        """Return the seconds and the peak memory of a stage's last run."""
        return self.json("metrics/costs.json").get(stage, {})

    @cached_property
    def machines(self) -> list[str]:
        """The machines that the stages ran on; none where the revision is older than that note."""
        costs = self.json("metrics/costs.json").values()
        return sorted({cost["machine"] for cost in costs if "machine" in cost})

    def table(self, path: str) -> list[dict[str, Any]]:
        """Return the rows of a CSV file or of a JSON list; numbers are numbers."""
        text = self.read(path)
        if text is None:
            return []
        if path.endswith(".json"):
            return self.json(path)
        return [
            {key: _number(value) for key, value in row.items()}
            for row in csv.DictReader(io.StringIO(text))
        ]


def find_base(given: str | None) -> Revision:
    """Return what to compare with: what was given, else where this branch left main, else the last commit."""
    for name in (given,) if given else MAIN:
        if _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").returncode == 0:
            return Revision(name) if given else _fork_point(name)
    way_out = FETCH_ALL if _shallow() else "give one, as in `lab review HEAD~1`"
    raise UserError(f"{given or 'main'} is no commit of this repository: {way_out}")


def _fork_point(branch: str) -> Revision:
    """Return where HEAD left a branch; on the branch itself, its last commit, or the one before."""
    base, head = (
        _git(*words).stdout.strip()
        for words in (("merge-base", branch, "HEAD"), ("rev-parse", "HEAD"))
    )
    if base and base != head:
        return Revision(_git("rev-parse", "--short", base).stdout.strip())
    dirty = _git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    parent = _git("rev-parse", "--verify", "--quiet", "HEAD~1").returncode == 0
    if not dirty and not parent and _shallow():
        raise UserError(f"there is nothing to compare with: {FETCH_ALL}")
    return Revision("HEAD" if dirty or not parent else "HEAD~1")


def _shallow() -> bool:
    """Say whether the clone lacks commits that the repository has."""
    return _git("rev-parse", "--is-shallow-repository").stdout.strip() == "true"


def describe(revision: Revision) -> str:
    """Name a revision as people know it: what they call it, its commit, its subject."""
    if revision.name == WORKSPACE:
        dirty = _git("status", "--porcelain", "--untracked-files=no").stdout.strip()
        head = _git("log", "-1", "--format=%h (%s)").stdout.strip()
        return f"{head} with uncommitted changes" if dirty else head
    return _git("log", "-1", "--format=%h (%s)", revision.name).stdout.strip()


def changed_files(base: Revision) -> list[str]:
    """Return the files that differ between a commit and the workspace."""
    return _git("diff", "--name-only", "--relative", base.name).stdout.split("\n")[:-1]


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], capture_output=True, text=True)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
