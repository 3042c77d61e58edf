"""Runs as their stages' files tell them: which there are, which stages each had, whether it goes on.

for run in runs():
    run.name, run.alive, [stage.name for stage in run.stages]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.core import live
from stages.core.live import Event


@dataclass(frozen=True)
class Stage:
    """A stage with all that it told, the oldest first."""

    name: str
    events: list[Event]

    @property
    def last(self) -> Event:
        """What it told last; nothing yet."""
        return self.events[-1] if self.events else {}

    @property
    def has_ended(self) -> bool:
        """Whether it said so."""
        return "ended" in self.last or "failed" in self.last

    @property
    def loop(self) -> list[Event]:
        """What it told of the loop that it is in, or was in last."""
        steps = [event for event in self.events if "done" in event]
        return [event for event in steps if event.get("what") == steps[-1].get("what")]

    def values(self, name: str) -> list[float]:
        """Return a curve."""
        return [event[name] for event in self.events if name in event]

    def seconds_left(self, now: float) -> float | None:
        """Return how long the loop still takes at its pace; None where that cannot be told."""
        # what a run before this one did took none of this one's time
        loop = [event for event in self.loop if not event.get("earlier")]
        if len(loop) < 2 or not loop[-1].get("of") or loop[-1]["done"] <= loop[0]["done"]:
            return None
        first, last = loop[0], loop[-1]
        pace = (last["time"] - first["time"]) / (last["done"] - first["done"])
        return max(0.0, pace * (last["of"] - last["done"]) - (now - last["time"]))


@dataclass(frozen=True)
class Run:
    """A run of the pipeline: its stages in the order in which they began."""

    name: str
    stages: list[Stage]
    alive: bool
    state: str = ""  # in Azure ML's words

    def is_at(self, stage: Stage) -> bool:
        """Say whether a stage is the one at work."""
        return self.alive and stage is self.stages[-1] and not stage.has_ended

    @property
    def began(self) -> float:
        """When its first stage did."""
        return self.stages[0].events[0]["time"] if self.stages else 0.0


def runs(root: Path = Path()) -> list[Run]:
    """Return the runs that this clone knows, the newest last."""
    found = [read(folder) for folder in (root / live.FOLDER).glob("*/")]
    return sorted((run for run in found if run.stages), key=lambda run: run.began)


def read(folder: Path) -> Run:
    """Return the newest run of a folder."""
    stages = newest(folder)
    alive = bool(stages) and live.is_alive(stages[-1].events[0]["run"])
    # one that has just ended may have told its end since
    return Run(folder.name, stages if alive else newest(folder), alive)


def newest(folder: Path) -> list[Stage]:
    """Return the stages of the run that began last: the workspace has files of older runs beside them."""
    told = [Stage(file.stem, live.events(file)) for file in folder.glob("*.jsonl")]
    begun = [stage for stage in told if stage.events and "run" in stage.events[0]]
    begun.sort(key=lambda stage: stage.events[0]["time"])
    return [s for s in begun if s.events[0]["run"] == begun[-1].events[0]["run"]]
