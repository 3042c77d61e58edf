"""A run as text: a few lines that a terminal renews, or a line for each thing that happens."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from lab.watch.runs import Run, Stage
from stages.core.live import Event

BARS = "▁▂▃▄▅▆▇█"
FORMATS = {  # of what training logs
    "loss": "loss {:.4g}",
    "validation_loss": "validation {:.4g}",
    "learning_rate": "lr {:.2g}",
    "grad_norm": "gradient {:.2g}",
    "tokens_per_second": "{:.0f} tokens/s",
}
LEAST = 10  # percent of a loop: what a piped line is worth that says only how far it is


def frame(run: Run, width: int, now: float) -> list[str]:
    """Return a run in a few lines: its stages, and the curves of the one that is, or was last, at work."""
    lines = [f"{run.name}{f': {run.state}' if run.state else ''}"]
    for stage in run.stages:
        lines.append(f"  {stage.name:9} {says(stage, run.is_at(stage), now)}")
    if run.stages and (losses := run.stages[-1].values("loss")):
        lines.append(f"  {curves(latest(run.stages[-1]))}")
        if can_print(BARS):
            ends = f" {losses[0]:.4g} to {losses[-1]:.4g}"
            lines.append(f"  {sparkline(losses, width - 2 - len(ends))}{ends}")
    return [line[:width] for line in lines]


def says(stage: Stage, at_work: bool, now: float) -> str:
    """Say what a stage is at, what it made, or why it failed."""
    if "ended" in stage.last:
        return stage.last["ended"]
    if "failed" in stage.last:
        return f"failed: {stage.last['failed']}"
    where = position(stage.loop[-1]) if stage.loop else "begins"
    left = stage.seconds_left(now) if at_work else None
    return where if left is None else f"{where}, {clock(left)} left"


def position(event: Event) -> str:
    """Say how far a loop is: training, step 65 of 120, 54 %."""
    what, done, of = event.get("what", ""), event["done"], event.get("of")
    unit = f", {event['unit']}" if event.get("unit") else ""
    return f"{what}{unit} {done}" + (f" of {of}, {100 * done // of} %" if of else "")


def ending(run: Run) -> str:
    """Say how a run has ended where no stage's own last line does; else nothing."""
    if run.state:
        return f"{run.name}: {run.state}"
    killed = run.stages and not run.stages[-1].has_ended
    return f"{run.stages[-1].name}: ended without a word: was it killed?" if killed else ""


def latest(stage: Stage) -> Event:
    """Return the last value of every curve."""
    return {name: values[-1] for name in FORMATS if (values := stage.values(name))}


def curves(values: Event) -> str:
    """Say what training logged."""
    return ", ".join(FORMATS[name].format(values[name]) for name in FORMATS if name in values)


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw a curve in one line: each place the mean of its part."""
    width = max(1, min(width, len(values)))
    parts = [
        values[place * len(values) // width : (place + 1) * len(values) // width]
        for place in range(width)
    ]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def clock(seconds: float) -> str:
    """Write a time as minutes and seconds, or hours, minutes and seconds."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def can_print(text: str) -> bool:
    """Say whether this output has the characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


class News:
    """What has happened since the last look, a line each: for a pipe."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}  # a stage's events
        self.said: dict[tuple[str, str], int] = {}  # how far a loop was when it was said last

    def lines(self, run: Run) -> Iterator[str]:
        """Yield the new lines of a run."""
        for stage in run.stages:
            for number in range(self.seen.get(stage.name, 0), len(stage.events)):
                so_far = Stage(stage.name, stage.events[: number + 1])
                if self.is_worth_a_line(so_far):
                    yield f"{stage.name}: {told(so_far)}"
            self.seen[stage.name] = len(stage.events)

    def is_worth_a_line(self, stage: Stage) -> bool:
        """Say whether the last event is: an end, a logged value, or a tenth more of a loop."""
        event = stage.last
        if "done" not in event:
            return stage.has_ended
        loop = (stage.name, event.get("what", ""))
        share = 100 * event["done"] // event["of"] if event.get("of") else 0
        logged = any(name in event for name in FORMATS)
        if logged or loop not in self.said or share - self.said[loop] >= LEAST or share == 100:
            self.said[loop] = share
            return True
        return False


def told(stage: Stage) -> str:
    """Say what a stage told last."""
    event = stage.last
    if "done" not in event:
        return says(stage, at_work=False, now=event["time"])
    left = stage.seconds_left(event["time"])
    parts = [position(event), curves(event), f"{clock(left)} left" if left else ""]
    return ", ".join(filter(None, parts))
