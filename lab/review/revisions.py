"""What a revision says about itself: parameters, metrics, answers, costs, as git tracks them."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lab.git import git_output, need_commit
from stages.core.errors import UserError
from stages.params import flat, values_of
from stages.scoring.metrics import terms_of
from stages.scoring.predictions import Prediction

WORKSPACE = "workspace"
METRICS = ("metrics/quality.json", "metrics/size.json", "metrics/speed.json")
PREDICTIONS = "metrics/predictions.jsonl"
COSTS = "metrics/costs.json"
NOISE = "metrics/noise.json"
MAIN = ("origin/main", "main", "origin/HEAD", "master")  # what it may be called
FETCH_ALL = "this clone is shallow, `git fetch --unshallow` brings the commits before"


@dataclass(frozen=True)
class Revision:
    """A commit, or the files as they lie in the workspace.

    A file that it lacks counts as empty; one that cannot be read raises `UserError` with one line.
    """

    name: str

    def read(self, path: str) -> str | None:
        """Return a file's text, None where the revision lacks it."""
        data = self._bytes(path)
        if data is None:
            return None
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise self.unreadable(path, f"is not UTF-8 (byte {error.start})") from None
        if mark := re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE):
            line = text.count("\n", 0, mark.start()) + 1
            raise self.unreadable(path, f"holds a merge's conflict marks (line {line})")
        return text

    def _bytes(self, path: str) -> bytes | None:
        if self.name == WORKSPACE:
            return Path(path).read_bytes() if Path(path).is_file() else None
        shown = subprocess.run(["git", "show", f"{self.name}:./{path}"], capture_output=True)
        if shown.returncode == 0:
            return shown.stdout
        # a partial clone whose server is away lists files that it cannot show
        if _git("ls-tree", "--name-only", self.name, "--", path).stdout:
            said = shown.stderr.decode(errors="replace").split("\n")[0]
            raise UserError(f"{path} of {self.name}: git cannot show it: {said}")
        return None

    def unreadable(self, path: str, why: str) -> UserError:
        """Return the error to raise for a file that is not as the pipeline writes it."""
        if self.name == WORKSPACE:
            return UserError(f"{path} {why}: `git checkout HEAD {path}`, then `dvc repro`")
        return UserError(f"{path} of {self.name} {why}: compare with another commit")

    def parse(self, path: str, parse: Callable[[str], Any], kind: type = dict) -> Any:
        """Return what a file holds, an empty `kind` where there is no file."""
        text = self.read(path)
        if text is None:
            return kind()
        try:
            value = parse(text)
        except (ValueError, yaml.YAMLError) as error:
            raise self.unreadable(path, f"is unreadable ({_in_one_line(error)})") from None
        if not isinstance(value, kind):
            kinds: dict[type, str] = {dict: "a mapping", list: "a list of rows"}
            raise self.unreadable(path, f"is unreadable (it must hold {kinds[kind]})")
        return value

    @cached_property
    def params(self) -> dict[str, Any]:
        """Every parameter by its dotted name."""
        values = values_of(self.read("params.yaml") or "")
        if not values and self.read("params.yaml"):
            raise self.unreadable("params.yaml", "is unreadable (no YAML mapping)")
        params = flat(values)
        params.pop("conf_digest", None)
        return params

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Every metric by its name."""
        found: dict[str, float] = {}
        for path in METRICS:
            for name, value in flat(self.parse(path, _json)).items():
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise self.unreadable(path, f"has no number at {name}")
                found[name] = value
        return found

    @cached_property
    def noise(self) -> dict[str, list[float]]:
        """Every metric's values over training seeds, as `lab noise` wrote them."""
        metrics = self.parse(NOISE, _json).get("metrics", {})
        if not isinstance(metrics, dict) or not all(map(_is_spread, metrics.values())):
            raise self.unreadable(NOISE, "is unreadable (a metric without two values)")
        return {name: spread["values"] for name, spread in metrics.items()}

    @cached_property
    def noise_measured(self) -> str:
        """What metrics/noise.json was measured on, in words; empty where there is none."""
        found: dict[str, Any] = self.parse(NOISE, _json)
        if not found:
            return ""
        count = len(found.get("seeds") or [])
        return f"{count} seeds of commit {found.get('commit')} on {found.get('machine')}"

    @cached_property
    def predictions(self) -> list[Prediction]:
        """Every test prompt with its answers and scores."""
        # not splitlines(): U+2028 and the like may stand inside an answer
        lines = (self.read(PREDICTIONS) or "").split("\n")
        return [
            self._prediction(line, number) for number, line in enumerate(lines, 1) if line.strip()
        ]

    def _prediction(self, line: str, number: int) -> Prediction:
        try:
            found = Prediction.of(_json(line))
            terms_of([found])  # every score is a number
        except (ValueError, TypeError) as error:
            why = f"is unreadable (line {number}: {_in_one_line(error)})"
            raise self.unreadable(PREDICTIONS, why) from None
        except KeyError as error:
            raise self.unreadable(PREDICTIONS, f"lacks {error} in line {number}") from None
        return found

    @cached_property
    def lock(self) -> dict[str, Any]:
        """What dvc.lock says of every stage."""
        stages = self.parse("dvc.lock", yaml.safe_load).get("stages") or {}
        if not isinstance(stages, dict) or not all(map(_is_stage, stages.values())):
            raise self.unreadable("dvc.lock", "is unreadable (a stage without its files)")
        return stages

    @cached_property
    def costs(self) -> dict[str, dict[str, Any]]:
        """Return what every stage's last run took (seconds, GiB), and on which machine."""
        costs = self.parse(COSTS, _json)
        if not all(isinstance(cost, dict) for cost in costs.values()):
            raise self.unreadable(COSTS, "is unreadable (a stage without its figures)")
        return costs

    def table(self, path: str) -> list[dict[str, Any]]:
        """Return the rows of a CSV file or of a JSON list; numbers are numbers."""
        rows = self.parse(path, _json if path.endswith(".json") else _csv, list)
        if not all(isinstance(row, dict) for row in rows):
            raise self.unreadable(path, "is unreadable (a row without columns)")
        return rows


def find_base(given: str | None) -> Revision:
    """Return what to compare with: what was given, else where this branch left main, else the last commit."""
    need_commit()
    for name in (given,) if given else MAIN:
        if _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").returncode == 0:
            return Revision(name) if given else _fork_point(name)
    way_out = FETCH_ALL if _shallow() else "give one, as in `lab review HEAD~1`"
    raise UserError(f"{given or 'main'} is not a commit of this repository: {way_out}")


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
        head = _subject("HEAD")
        return f"{head} with uncommitted changes" if dirty else head
    return _subject(revision.name)


def _subject(name: str) -> str:
    # the "--": a branch may be called as a folder is
    return git_output("log", "-1", "--no-show-signature", "--format=%h (%s)", name, "--")


def changed_files(base: Revision) -> list[str]:
    """Return the files that differ between a commit and the workspace."""
    # -z: git writes other letters than ASCII as "\\303\\251" without it
    return git_output("diff", "--name-only", "--relative", "-z", base.name, "--").split("\0")[:-1]


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], capture_output=True, encoding="utf-8", errors="replace")


def _is_stage(entry: Any) -> bool:
    """Say whether an entry of dvc.lock lists its files as DVC does."""
    if not isinstance(entry, dict):
        return False
    listed = [entry.get("deps", []), entry.get("outs", [])]
    files = [file for files in listed for file in (files if isinstance(files, list) else [None])]
    return all(isinstance(file, dict) and "path" in file for file in files)


def _is_spread(spread: Any) -> bool:
    """Say whether a metric of metrics/noise.json has the values of two seeds or more."""
    values = spread.get("values") if isinstance(spread, dict) else None
    numbers = isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    return bool(numbers and len(values or []) > 1)


def _json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _csv(text: str) -> list[dict[str, Any]]:
    header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row] or [[]]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{len(row)} cells below a heading of {len(header)}: {','.join(row)}")
    return [dict(zip(header, map(_number, row), strict=True)) for row in rows]


def _number(text: str) -> float | str:
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a number")
    return number


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
