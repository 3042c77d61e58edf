"""The trials of a search among the experiments of a commit, and what a point would still have to run.

bench.finished()               # every experiment, of whatever origin, that is a point of the space
bench.stopped(point)           # a trial that breaks a limit by what its first stages gave, else None
bench.missing(point)           # the stages that it would run
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from lab.experiments.edits import DIGEST
from lab.git import git_output
from lab.noise import edited
from lab.review.revisions import Revision
from lab.search.goals import Limit, broken
from lab.search.record import Record, comparable, watched
from lab.search.space import LOOKED_AT, ON_TEST, SPLIT, Axis, Point, Space
from lab.search.study import Trial
from stages.core.errors import UserError
from stages.params import Values, compose, flat, values_of

PART = "part-"  # experiments of some stages alone, which go when their outputs are known
WORTH = (
    10  # seconds of later stages for which a run stops to look: DVC takes about half to start again
)


class Bench:
    """A commit, its pipeline, and the space that is searched on it."""

    def __init__(self, space: Space, limits: Sequence[Limit] = ()) -> None:
        """Look at the last commit. Raises `UserError` where its dvc.lock lacks a stage."""
        self.space, self.limits = space, limits
        self.head = Revision("HEAD")
        self.commit = git_output("rev-parse", "HEAD")
        self.place = f"refs/exps/{self.commit[:2]}/{self.commit[2:]}"
        self.record = Record(self.head.lock, self.head.metrics)
        self._composed: dict[tuple[str, ...], Values] = {}
        self._seen: dict[
            str, tuple[Values, Revision] | None
        ] = {}  # by commit: settings of a whole run

    def settings(self, point: Point, *more: str) -> Values:
        """Return all settings of a point, flat. Raises `UserError` where they are not valid together."""
        return self.composed(*self.space.overrides(point), *more)

    def composed(self, *overrides: str) -> Values:
        """Return what conf/ composes to, flat and without its digest."""
        if overrides not in self._composed:
            values = flat(values_of(compose(overrides)))
            values.pop(DIGEST, None)
            self._composed[overrides] = comparable(values)
        return self._composed[overrides]

    def trial_settings(self, point: Point) -> Values:
        """Return the settings that a trial of a point runs with."""
        return self.settings(point, LOOKED_AT)

    def name(self, point: Point, *more: str, kind: str = "trial-") -> str:
        """Return the name of a point's experiment, which its settings decide."""
        return kind + digest(self.settings(point, *more))[:8]

    # experiments

    def finished(self) -> dict[Point, Trial]:
        """Return the complete experiments on validation prompts that are points of the space."""
        found: dict[Point, Trial] = {}
        for name, (values, revision) in self.runs().items():
            if (point := self.point_of(values)) is not None:
                found.setdefault(point, Trial(point, name, revision.metrics, revision))
        return found

    def on_test(self, point: Point) -> tuple[str, Revision] | None:
        """Return the experiment, or the commit, that asked a point the test prompts."""
        wanted = self.settings(point, ON_TEST)
        runs = {
            git_output("rev-parse", "--short", "HEAD"): (self.head_settings, self.head)
        } | self.runs()
        return next(((name, run) for name, (values, run) in runs.items() if values == wanted), None)

    def runs(self) -> dict[str, tuple[Values, Revision]]:
        """Return the settings and the results of every complete experiment of this commit, by name."""
        listed = git_output("for-each-ref", "--format=%(objectname) %(refname)", self.place)
        found = {}
        for line in sorted(listed.splitlines(), key=lambda line: line.split()[1]):
            commit, _, ref = line.partition(" ")
            if commit not in self._seen:
                self._seen[commit] = self._look(commit)
            if run := self._seen[commit]:
                found[ref.rpartition("/")[2]] = run
        return found

    def take_parts(self, name: str = f"{PART}*") -> None:
        """Learn what runs of some stages made, and remove their experiments."""
        for ref in git_output(
            "for-each-ref", "--format=%(refname)", f"{self.place}/{name}"
        ).split():
            self.record.learn(Revision(ref).lock)  # empty if another search was faster
            with contextlib.suppress(UserError):
                git_output("update-ref", "-d", ref)

    def _look(self, commit: str) -> tuple[Values, Revision] | None:
        """Return the settings of an experiment, None where it is none of this code, or not complete."""
        if edited(self.commit, commit):
            return None
        revision = Revision(commit)
        self.record.learn(revision.lock)
        values = comparable(revision.params)
        whole = revision.metrics and self.record.is_whole(revision.lock, values)
        return (values, revision) if whole else None

    def point_of(self, values: Values) -> Point | None:
        """Return the point of the space that some settings are, None where they lie outside."""
        places: list[tuple[object, ...]] = []
        for axis in self.space.axes:
            if axis.is_group:
                places.append(axis.values)
            elif (place := axis.place_of(values.get(axis.key))) is not None:
                places.append((place,))
            else:
                return None
        points: Iterator[Point] = itertools.product(*places)
        return next(
            (p for p in points if self._valid(p) and self.trial_settings(p) == values), None
        )

    def _valid(self, point: Point) -> bool:
        try:
            self.trial_settings(point)
        except UserError:
            return False
        return True

    @cached_property
    def head_settings(self) -> Values:
        """The commit's own settings."""
        return comparable(self.head.params)

    @cached_property
    def today(self) -> Point | None:
        """The commit's own settings as a point, None where they lie outside of the space."""
        return self.point_of(self.head_settings | comparable({SPLIT: LOOKED_AT.partition("=")[2]}))

    # stages

    def stopped(self, point: Point) -> Trial | None:
        """Return the trial of a point whose first stages break a limit already."""
        metrics = self.record.early(self.record.trace(self.trial_settings(point)))
        if not broken(self.limits, metrics):
            return None
        return Trial(point, self.name(point, LOOKED_AT), metrics)

    def missing(self, point: Point, *more: str) -> list[str]:
        """Return the stages that a point would run, in order."""
        traced = self.record.trace(self.settings(point, *more), here=True)
        return [stage for stage in self.record.stages if stage not in traced]

    @cached_property
    def decisive(self) -> list[str]:
        """The stages after which a limit can be tested and much is left to save, the cheapest first."""
        known = {self.record.decides.get(limit.metric) for limit in self.limits}
        # a limit on the training must not train what a limit on the export, in seconds, would have stopped
        up_to = {
            stage: sum(map(self.cost, {stage, *self.record.needs[stage]}))
            for stage in self.record.stages
            if stage in known
        }
        total = sum(map(self.cost, self.record.stages))
        return sorted((s for s in up_to if total - up_to[s] > WORTH), key=lambda s: up_to[s])

    def cost(self, stage: str) -> float:
        """Return the seconds that a stage took last, 0 where that is not written down."""
        return float(self.head.costs.get(stage, {}).get("seconds", 0))

    def recipe(self, stage: str, values: Values) -> str:
        """Return what decides a stage's outputs on this commit: its settings, and those of all it needs."""
        seen = [self.record.lock[name] for name in {stage, *self.record.needs[stage]}]
        settings = {k: v for entry in seen for k, v in watched(entry, values).items()}
        return digest({"stage": stage, "commit": self.commit, **settings})

    def first_stage(self, axis: Axis) -> int:
        """Return the place of the first stage that an axis changes. Raises `UserError` for none."""
        base, *others = [self.composed(axis.override(value)) for value in axis.ends]
        changed = {k for values in [self.head_settings, *others] for k in differing(base, values)}
        for place, stage in enumerate(self.record.stages):
            if watched(self.record.lock[stage], dict.fromkeys(changed)):
                return place
        if not changed:  # a single value, and it is today's
            return len(self.record.stages)
        raise UserError(f"{axis.key}: no stage depends on it, so there is nothing to search")

    def outermost_first(self) -> list[Axis]:
        """Return the axes, those of early stages first: in this order points share most."""
        return sorted(self.space.axes, key=self.first_stage)

    def seconds(self, points: Iterable[Point]) -> dict[str, tuple[int, float]]:
        """Return how often each stage would run for some points, and for how long by metrics/costs.json."""
        ran: dict[str, set[str]] = {stage: set() for stage in self.record.stages}
        for point in points:
            values = self.trial_settings(point)
            for stage in self.missing(point, LOOKED_AT):
                ran[stage].add(self.recipe(stage, values))
        return {s: (len(some), len(some) * self.cost(s)) for s, some in ran.items() if some}


def differing(one: Values, other: Values) -> list[str]:
    """Return the settings that are not the same in both."""
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


def digest(values: Values) -> str:
    """Return hex digits of sha256 over settings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
