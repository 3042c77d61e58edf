"""What a search is after: metrics to maximize or minimize, and limits that the model must keep to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lab.review.meanings import is_timing
from stages.core.errors import UserError
from stages.params import Values

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Goal:
    """A metric, and which way is better."""

    metric: str
    maximize: bool

    def better(self, one: float, other: float) -> bool:
        """Say whether one value is better than another."""
        return one > other if self.maximize else one < other


@dataclass(frozen=True)
class Limit:
    """What one metric must keep to, and who says so."""

    metric: str
    bound: float
    at_most: bool
    origin: str  # the option, or the gate

    def excess(self, value: float) -> float:
        """Return by how much a value breaks the limit; 0 or less where it keeps to it."""
        return value - self.bound if self.at_most else self.bound - value

    def __str__(self) -> str:
        """Say what is asked for."""
        return f"{self.metric} at {'most' if self.at_most else 'least'} {self.bound:g}"


def goals(maximize: Sequence[str], minimize: Sequence[str], known: Metrics) -> list[Goal]:
    """Return the goals in the order that they weigh in tables. Raises `UserError` for an unknown metric."""
    named = [*maximize, *minimize]
    if not named:
        raise UserError("what is best? Give --maximize METRIC or --minimize METRIC, one or several")
    for name in named:
        need(name, known)
    if twice := [name for name in named if named.count(name) > 1]:
        raise UserError(f"{twice[0]} is given twice as what is best")
    return [Goal(name, name in maximize) for name in named]


def limits(under: Sequence[str], over: Sequence[str], gates: Values, known: Metrics) -> list[Limit]:
    """Return the limits of the options, then those of the gates of metrics that no option names."""
    asked = [limit("--under", word, known) for word in under]
    asked += [limit("--over", word, known) for word in over]
    names = {each.metric for each in asked}
    return [*asked, *(each for each in of_gates(gates) if each.metric not in names)]


def limit(option: str, word: str, known: Metrics) -> Limit:
    """Return the limit of METRIC=NUMBER. Raises `UserError` for anything else."""
    name, _, text = word.partition("=")
    try:
        bound = float(text)
    except ValueError:
        raise UserError(f"{option} {word}: write {option} METRIC=NUMBER") from None
    need(name, known)
    return Limit(name, bound, option == "--under", option)


def of_gates(gates: Values) -> list[Limit]:
    """Return the minima and maxima of conf/evaluate/gates; a regression has no baseline on validation."""
    found = []
    for key, bound in gates.items():
        name, _, kind = key.rpartition(".")
        if kind in ("minimum", "maximum") and bound is not None:
            found.append(Limit(name, float(bound), kind == "maximum", "gate"))
    return found


def need(name: str, known: Metrics) -> None:
    """Raise `UserError` for a metric that the last run did not have."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "`dvc metrics show` lists them"
        raise UserError(f"{name} is no metric of this pipeline; {hint}")


def broken(limits: Iterable[Limit], metrics: Metrics) -> list[Limit]:
    """Return the limits that these metrics break; one that is not measured breaks none yet."""
    return [
        each for each in limits if each.metric in metrics and each.excess(metrics[each.metric]) > 0
    ]


def miss(limits: Iterable[Limit], metrics: Metrics) -> float:
    """Return how far metrics are from keeping to all limits, each in shares of its own bound."""
    return sum(
        each.excess(metrics[each.metric]) / (abs(each.bound) or 1)
        for each in broken(limits, metrics)
    )


def timed(goals: Iterable[Goal]) -> list[str]:
    """Return the goals that depend on what else the machine does."""
    return [goal.metric for goal in goals if is_timing(goal.metric)]
