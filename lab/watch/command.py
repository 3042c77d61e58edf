"""Follow a run while it runs: stages, loss, learning rate, speed, what is left.

lab watch                 # what runs here: the workspace, or an experiment of --temp or --queue
lab watch bold-fish       # an experiment, or a job of lab submit

It reads what the stages write beside their work (.dvc/tmp/live), or a job's metrics in Azure ML, and ends
with the run.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lab.watch import view
from lab.watch.runs import Run, read, runs
from stages.core import live
from stages.core.errors import UserError

PAUSE = 1.0  # seconds between two looks at files
PATIENCE = 10.0  # and at a job
Look = Callable[[], Run]


def watch(
    name: Annotated[
        str | None, typer.Argument(metavar="EXP|JOB", help="Which [default: what runs here].")
    ] = None,
) -> None:
    """Follow a run while it runs. An experiment here, queued ones too, or an Azure ML job."""
    if not Path("dvc.yaml").is_file():
        raise UserError("no dvc.yaml here: run it in the repository's root")
    known = runs()
    if name and not any(run.name == name for run in known):
        follow(look_elsewhere(name), PATIENCE)
        return
    wanted = [run for run in known if name in (None, run.name)]
    alive = [run for run in wanted if run.alive]
    if alive:
        if others := [run.name for run in alive[:-1]]:
            print(f"also at work: {', '.join(others)} (lab watch NAME)", flush=True)
        follow(partial(read, live.FOLDER / alive[-1].name), PAUSE)
    elif wanted:
        print(f"{'it has ended' if name else 'nothing runs here'}; the last that was seen:")
        lines = [*view.frame(wanted[-1], columns(), time.time()), view.ending(wanted[-1])]
        print("\n".join(filter(None, lines)))
    else:
        print("nothing runs here, and nothing did that lab watch has seen: dvc repro, dvc exp run")


def look_elsewhere(name: str) -> Look:
    """Return how to look at an Azure ML job. Raises `UserError` for what has no figures yet, or is nobody."""
    from lab.azureml import workspace
    from lab.experiments.request import taken_names

    state = taken_names().get(name)
    if state == "queued":
        raise UserError(f"{name} waits in the queue: `dvc queue start` lets it begin")
    if state == "running":
        raise UserError(f"{name} has begun, but no stage of it yet: try again in a moment")
    place = workspace.find()
    if place is None:
        raise UserError(
            f"{name} is no run that was seen here (`lab watch` shows the last, `lab exp` what has ended), "
            f"and no Azure ML workspace is named whose job it could be: {workspace.HOW}"
        )
    from lab.watch.jobs import look_at_job

    return look_at_job(place.connect(), name)


def follow(look: Look, pause: float) -> None:
    """Show a run until it has ended."""
    try:
        (renew if sys.stdout.isatty() else append)(look, pause)
    except KeyboardInterrupt:
        print("\nno longer watching: the run goes on", flush=True)


def renew(look: Look, pause: float) -> None:
    """Write the run's lines over the last ones, in a terminal."""
    height = 0
    while True:
        run = look()
        lines = view.frame(run, columns(), time.time())
        above = f"\x1b[{height}F\x1b[J" if height else ""  # up to the first of them, and clear
        print(above + "\n".join(lines), flush=True)
        height = len(lines)
        if not run.alive:
            if not run.state and view.ending(run):
                print(view.ending(run))
            return
        time.sleep(pause)


def append(look: Look, pause: float) -> None:
    """Write a line for what is new, into a pipe, and how the run ended."""
    news = view.News()
    while True:
        run = look()
        for line in news.lines(run):
            print(line, flush=True)
        if not run.alive:
            print(view.ending(run), end="\n" if view.ending(run) else "", flush=True)
            return
        time.sleep(pause)


def columns() -> int:
    """Return the width of the terminal; of a pipe 80."""
    return shutil.get_terminal_size().columns
