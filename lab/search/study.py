"""Which point to try next: every one of a small space, else what Optuna's TPE proposes.

propose(space, goals, limits, trials, running, seed)

The study is built anew for each question from the trials that there are, and the sampler's seed follows from
how many they are: so a search that was killed asks for the same points as one that was not.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from lab.review.revisions import Revision
from lab.search.goals import Goal, Limit, broken
from lab.search.space import Axis, Point, Space
from stages.params import values_of

ASKS = (
    30  # TPE proposes points again that it knows (optuna#2021): asked so often, then chance decides
)


@dataclass(frozen=True)
class Trial:
    """What came of one point."""

    point: Point
    name: str  # the experiment's
    metrics: dict[str, float] = field(default_factory=dict)
    revision: Revision | None = None  # None: it was stopped at a limit, or failed
    reason: str = ""  # why it failed

    @property
    def failed(self) -> bool:
        """Whether it gave no answer."""
        return bool(self.reason)

    def feasible(self, limits: Sequence[Limit]) -> bool:
        """Say whether it ran to its end and keeps to all limits."""
        return self.revision is not None and not broken(limits, self.metrics)


def propose(
    space: Space,
    goals: Sequence[Goal],
    limits: Sequence[Limit],
    trials: Collection[Trial],
    running: Collection[Point],
    seed: int,
) -> Point | None:
    """Return a point that nobody has tried, None where there is none left."""
    tried = {*(trial.point for trial in trials), *running}
    if len(tried) >= space.size:
        return None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        directions=["maximize" if goal.maximize else "minimize" for goal in goals],
        sampler=optuna.samplers.TPESampler(seed=seed + len(tried)),
    )
    distributions = {axis.key: distribution(axis) for axis in space.axes}
    # in an order of their own: that of their ending is another one each time
    for trial in sorted(trials, key=lambda trial: str(trial.point)):
        if not trial.failed:
            study.add_trial(told(space, goals, limits, trial, distributions))
    for point in sorted(running, key=str):
        placed = places(space, point)
        study.add_trial(
            create_trial(state=TrialState.RUNNING, params=placed, distributions=distributions)
        )
    for _ in range(ASKS):
        asked = study.ask(distributions)
        point = tuple(value_at(axis, asked.params[axis.key]) for axis in space.axes)
        if point not in tried:
            return point
    return by_chance(space, tried, seed + len(tried))


def told(
    space: Space,
    goals: Sequence[Goal],
    limits: Sequence[Limit],
    trial: Trial,
    distributions: dict[str, BaseDistribution],
) -> FrozenTrial:
    """Return a trial as Optuna knows it: one that was stopped has no value, but misses a limit by so much."""
    return create_trial(
        values=[trial.metrics.get(goal.metric, 0.0) for goal in goals],
        params=places(space, trial.point),
        distributions=distributions,
        constraints={
            f"{each.metric} {each.at_most}": each.excess(trial.metrics[each.metric])
            / (abs(each.bound) or 1)
            if each.metric in trial.metrics
            else 0.0
            for each in limits
        },
    )


def by_chance(space: Space, tried: Collection[Point], seed: int) -> Point | None:
    """Return some point that is not among the tried."""
    draw = random.Random(seed)
    for _ in range(1000):
        point = tuple(drawn(axis, draw) for axis in space.axes)
        if point not in tried:
            return point
    left = space.points(space.axes) if space.size < 1e6 else iter(())
    return next((point for point in left if point not in tried), None)


def drawn(axis: Axis, draw: random.Random) -> Any:
    """Draw a value of an axis."""
    if axis.values:
        return draw.choice(axis.values)
    if axis.log:
        return axis.number(axis.low * (axis.high / axis.low) ** draw.random())
    return axis.number(draw.uniform(axis.low, axis.high))


def distribution(axis: Axis) -> BaseDistribution:
    """Return an axis as Optuna knows it: of listed numbers the places in order, so that near is near."""
    if not axis.values:
        kind = IntDistribution if axis.whole else FloatDistribution
        return kind(axis.low, axis.high, log=axis.log)  # type: ignore[arg-type]
    if ordered(axis) is not None:
        return IntDistribution(0, len(axis.values) - 1)
    return CategoricalDistribution(axis.values)


@cache
def ordered(axis: Axis) -> tuple[Any, ...] | None:
    """Return listed numbers in their order, None where not all are numbers."""
    numbers: list[Any] = [values_of(f"v: {value}").get("v") for value in axis.values]
    if all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        return tuple(value for _, value in sorted(zip(numbers, axis.values, strict=True)))
    return None


def places(space: Space, point: Point) -> dict[str, Any]:
    """Return a point as Optuna's parameters."""
    found = {}
    for axis, value in zip(space.axes, point, strict=True):
        order = ordered(axis) if axis.values else None
        found[axis.key] = value if order is None else order.index(value)
    return found


def value_at(axis: Axis, place: Any) -> Any:
    """Return the value of an axis that Optuna's parameter stands for."""
    if not axis.values:
        return axis.number(place)
    order = ordered(axis)
    return place if order is None else order[place]
