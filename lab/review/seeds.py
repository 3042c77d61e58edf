"""How sure a change is beyond the prompts: what another training seed does, as `lab noise` measured it.

    doubts(base, head, intervals(...))["rouge_l"].hidden_by      # "prompts", "seeds", or nothing: it is sure

metrics/noise.json holds each metric's values over several seeds of one commit. A change compares one run of
either side, so that the variance of both counts; by few seeds it is known badly, and Student's t says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot
from statistics import stdev, variance

from lab.review.revisions import Revision
from stages.scoring.predictions import MODELS
from stages.scoring.proportions import Interval, Z

# the 97.5 % points of Student's t for 1, 2, 3 … degrees of freedom; above, the normal distribution's
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
WORDS = {"prompts": "other test prompts", "seeds": "another training seed"}


@dataclass(frozen=True)
class Doubt:
    """What could explain a change, other than that there is one."""

    change: float
    prompts: Interval | None = None  # where it would fall with other prompts; None: not made of any
    seeds: float | None = None  # how far seeds alone could move it; None: not measured

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval by prompts and seeds together: distances are squared and added.

        The variances of what is independent add; as intervals need not be symmetric, each side is added
        for itself (MOVER: Zou and Donner 2008, Statistics in Medicine 27:1693).
        """
        low, high = self.prompts or (self.change, self.change)
        if not self.seeds:
            return self.prompts
        return (
            self.change - hypot(self.change - low, self.seeds),
            self.change + hypot(high - self.change, self.seeds),
        )

    @property
    def hidden_by(self) -> str:
        """What hides the change: prompts, seeds, both, or both only together; nothing where none does."""
        causes = []
        if self.prompts and holds_zero(self.prompts):
            causes.append("prompts")
        if self.seeds and abs(self.change) <= self.seeds:
            causes.append("seeds")
        if not causes and self.interval and holds_zero(self.interval):
            return "prompts and seeds together"
        return " and ".join(causes)

    @property
    def explanation(self) -> str:
        """What hides the change, as part of a sentence."""
        text = self.hidden_by
        for cause, words in WORDS.items():
            text = text.replace(cause, words)
        return text

    @property
    def sure(self) -> bool:
        """Whether neither prompts nor seeds explain the change, and both were measured."""
        return self.prompts is not None and self.seeds is not None and not self.hidden_by


def holds_zero(interval: Interval) -> bool:
    """Say whether an interval does not tell which way a change went."""
    return interval[0] <= 0 <= interval[1]


def doubts(base: Revision, head: Revision, prompts: dict[str, Interval]) -> dict[str, Doubt]:
    """Return what could explain the change of every metric that both revisions have."""
    found = {}
    for name in base.metrics.keys() & head.metrics.keys():
        change = head.metrics[name] - base.metrics[name]
        seeds = by_seeds(name, base.noise.get(name), head.noise.get(name))
        found[name] = Doubt(change, prompts.get(name), seeds)
    return found


def by_seeds(name: str, before: list[float] | None, after: list[float] | None) -> float | None:
    """Return how far another seed could move a metric's change (95 %), None where nobody measured it.

    Of two measurements each side has its own; else the one holds for both. Degrees of freedom are those
    of Welch (1947) and Satterthwaite (1946).
    """
    if name.endswith(MODELS["base"]):
        return 0.0  # the model without its adapter knows of no training
    one, other = before or after, after or before
    if one is None or other is None:
        return None
    both = variance(one) + variance(other)
    if one == other or not both:
        freedom = len(one) - 1
    else:
        parts = sum(variance(each) ** 2 / (len(each) - 1) for each in (one, other))
        freedom = int(both**2 / parts)
    return student(freedom) * both**0.5


def student(freedom: int) -> float:
    """Return the 97.5 % point of Student's t."""
    return STUDENT[freedom - 1] if freedom <= len(STUDENT) else Z


def spread(values: list[float]) -> dict[str, float | list[float]]:
    """Return what metrics/noise.json holds of a metric's values, one per seed."""
    return {
        "mean": round(sum(values) / len(values), 6),
        "standard_deviation": round(stdev(values), 6),
        "min": min(values),
        "max": max(values),
        "values": values,
    }
