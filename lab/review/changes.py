"""What differs between two revisions: parameters, metrics, stages, answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lab.review.intervals import by_key
from lab.review.meanings import is_timing, worse_by
from lab.review.revisions import Revision
from lab.review.seeds import Doubt
from stages.scoring.predictions import Prediction


@dataclass(frozen=True)
class Metric:
    """One metric before and after, and what can be said of the difference."""

    name: str
    before: float | None
    after: float | None
    doubt: Doubt | None = None

    @property
    def change(self) -> float | None:
        """The difference, None where one side lacks the metric."""
        if self.before is None or self.after is None:
            return None
        return round(self.after - self.before, 6)

    @property
    def worse(self) -> bool:
        """Whether the change, taken as it stands, is for the worse."""
        return (worse_by(self.name, self.change or 0) or 0) > 0

    @property
    def verdict(self) -> str:
        """Better, worse, or noise; sure is what neither prompts nor seeds explain, and both were measured."""
        if self.change is None:
            return "new" if self.before is None else "gone"
        if self.change == 0:
            return "same"
        if is_timing(self.name) or worse_by(self.name, 1) is None:
            return "depends on the machine" if is_timing(self.name) else "changed"
        way = "worse" if self.worse else "better"
        if self.doubt and self.doubt.hidden_by:
            return f"could be noise ({self.doubt.hidden_by})"
        if self.doubt and self.doubt.sure:
            return f"surely {way}"
        return f"{way} beyond the prompts" if self.doubt and self.doubt.prompts else way


@dataclass(frozen=True)
class Answer:
    """One test prompt whose answer changed."""

    prediction: Prediction
    before: str
    gained: int  # exact match: 1 newly right, -1 newly wrong, 0 neither
    chrf: float  # by how much chrF grew

    @property
    def verdict(self) -> str:
        """What became of the answer."""
        return {1: "newly right", -1: "newly wrong", 0: "reworded"}[self.gained]


@dataclass(frozen=True)
class Stage:
    """One stage's costs before and after."""

    name: str
    ran: bool
    before: dict[str, Any]
    after: dict[str, Any]
    size_before: int
    size_after: int

    @property
    def moved(self) -> bool:
        """Whether both runs say on which machine they were, and it is another one."""
        machines = {self.before.get("machine"), self.after.get("machine")}
        return len(machines - {None}) == 2


def parameters(base: Revision, head: Revision) -> list[tuple[str, Any, Any]]:
    """Return (name, before, after) of every parameter that differs."""
    names = sorted(base.params.keys() | head.params.keys())
    pairs = [(name, base.params.get(name, "—"), head.params.get(name, "—")) for name in names]
    return [row for row in pairs if row[1] != row[2]]


def metrics(base: Revision, head: Revision, sure: dict[str, Doubt]) -> list[Metric]:
    """Return every metric of either revision, in the order of the later one."""
    names = list(dict.fromkeys([*head.metrics, *base.metrics]))
    return [Metric(n, base.metrics.get(n), head.metrics.get(n), sure.get(n)) for n in names]


def stages(base: Revision, head: Revision) -> list[Stage]:
    """Return what every stage cost, and whether it ran again in between."""
    return [
        Stage(
            name,
            base.lock.get(name) != entry,
            base.costs.get(name, {}),
            head.costs.get(name, {}),
            bytes_of(base.lock.get(name, {})),
            bytes_of(entry),
        )
        for name, entry in head.lock.items()
    ]


def machines_of(revision: Revision) -> dict[str, list[str]]:
    """Return the machines that a revision's stages ran on, and which stages each of them ran."""
    found: dict[str, list[str]] = {}
    for name in revision.lock:
        if machine := revision.costs.get(name, {}).get("machine"):
            found.setdefault(machine, []).append(name)
    return found


def bytes_of(entry: dict[str, Any]) -> int:
    """Return the size of a stage's outputs, as dvc.lock has it."""
    return sum(out.get("size", 0) for out in entry.get("outs", []))


def answers(base: Revision, head: Revision) -> list[Answer]:
    """Return the answers that changed: newly right and wrong first, then by how much chrF moved."""
    earlier, later = by_key(base.predictions), by_key(head.predictions)
    changed = [
        compare(earlier[key], prediction)
        for key, prediction in later.items()
        if key in earlier and earlier[key].adapter != prediction.adapter
    ]
    return sorted(changed, key=lambda answer: (-abs(answer.gained), -abs(answer.chrf)))


def compare(before: Prediction, after: Prediction) -> Answer:
    """Compare the answers to one prompt."""
    old, new = before.scores["adapter"], after.scores["adapter"]
    gained = (new.exact_match or 0) - (old.exact_match or 0)
    return Answer(after, before.adapter, gained, round(new.chrf - old.chrf, 2))
