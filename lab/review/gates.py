"""What conf/evaluate/gates insists on, and whether the metrics keep to it."""

from __future__ import annotations

from dataclasses import dataclass

from lab.review.meanings import worse_by
from lab.review.seeds import Doubt
from stages.core.errors import UserError
from stages.core.settings import Gate


@dataclass(frozen=True)
class Verdict:
    """One gate's verdict, and why."""

    metric: str
    passed: bool
    reason: str


def judge(
    gates: dict[str, Gate],
    before: dict[str, float],
    after: dict[str, float],
    sure: dict[str, Doubt],
) -> list[Verdict]:
    """Return the verdict of every gate."""
    return [
        verdict(name, gate, before.get(name), after.get(name), sure.get(name))
        for name, gate in gates.items()
    ]


def verdict(
    name: str, gate: Gate, before: float | None, after: float | None, doubt: Doubt | None
) -> Verdict:
    """Judge one metric; what noise could explain is no regression."""
    if after is None:
        return Verdict(name, False, "not measured")
    if gate.minimum is not None and after < gate.minimum:
        return Verdict(name, False, f"{after:g} is below the minimum {gate.minimum:g}")
    if gate.maximum is not None and after > gate.maximum:
        return Verdict(name, False, f"{after:g} is above the maximum {gate.maximum:g}")
    if gate.regression is None or before is None:
        return Verdict(name, True, kept(gate))
    return regression(name, gate.regression, worsening(name, before, after), doubt, kept(gate))


def regression(
    name: str, allowed: float, worse: float, doubt: Doubt | None, limits: str
) -> Verdict:
    """Judge how much worse a metric became."""
    if worse <= allowed:
        return Verdict(name, True, limits)
    text = f"worse by {worse:.4g}, {allowed:g} allowed"
    if doubt and doubt.hidden_by:
        return Verdict(name, True, f"{text}, but {doubt.explanation} could explain it")
    unknown = doubt is not None and doubt.seeds is None
    return Verdict(name, False, f"{text} (training seeds not measured)" if unknown else text)


def worsening(name: str, before: float, after: float) -> float:
    """Return how much worse a metric became, negative where it became better."""
    worse = worse_by(name, after - before)
    if worse is None:
        raise UserError(
            f"evaluate.gates.{name}.regression: is more {name} better, or less? Use minimum or maximum"
        )
    return round(worse, 6)


def kept(gate: Gate) -> str:
    """Say what a gate asks for."""
    asked = {"at least": gate.minimum, "at most": gate.maximum, "worse by at most": gate.regression}
    return ", ".join(f"{word} {limit:g}" for word, limit in asked.items() if limit is not None)
