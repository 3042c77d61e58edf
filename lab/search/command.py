"""Search for the settings that are best within limits, by experiments of this commit.

lab search finetune.rank=8,16,32 --maximize recall_exact_match              # every point of a small space
lab search finetune.lr=1e-4..1e-2:log quantize=awq,rtn --maximize recall_exact_match --under onnx_mb=80
lab search finetune.rank=8,16 --maximize rouge_l --dry-run                  # how many, and how long

Each trial is an experiment (`dvc exp run --temp`), which leaves the workspace alone and is asked the
validation prompts; the winner alone is asked the test prompts. What has run, here or elsewhere, is not run
again: the same command continues after Ctrl-C or a crash, and two at once share the work.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from lab.git import need_commit
from lab.noise import check_ready
from lab.search import report, runner
from lab.search.bench import Bench
from lab.search.course import TRIALS, Budget, Course
from lab.search.goals import goals, limits
from lab.search.space import parse
from stages.core.errors import UserError
from stages.params import Values

GATES = "evaluate.gates."


def search(
    space: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=A,B|LOW..HIGH[:log]...", help="Settings, or groups of conf/."),
    ] = None,
    maximize: Annotated[
        list[str] | None, typer.Option(metavar="METRIC", help="What is best; repeatable.")
    ] = None,
    minimize: Annotated[
        list[str] | None, typer.Option(metavar="METRIC", help="What is best; repeatable.")
    ] = None,
    under: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=N", help="At most; repeatable.")
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", "--at-least", metavar="METRIC=N", help="At least; repeatable."),
    ] = None,
    gates: Annotated[
        bool, typer.Option(help="The gates' minima and maxima are limits too.")
    ] = True,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help=f"In all, with those that are there [default: all, or {TRIALS}]."),
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0, help="Start no trial that would end later.")
    ] = None,
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, help="Trials at once.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of what is proposed.")] = 42,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would run, and for how long.")
    ] = False,
) -> None:
    """Find the best settings within limits. Exit code 1: no trial keeps to them."""
    need_commit()
    if not Path("dvc.yaml").is_file():
        raise UserError("no dvc.yaml here: run it in the repository's root")
    found = parse(space or [])
    check_ready({axis.key for axis in found.axes})
    bench = Bench(found)
    wanted = goals(maximize or [], minimize or [], bench.head.metrics)
    bench.limits = limits(
        under or [], over or [], gates_of(bench) if gates else {}, bench.head.metrics
    )
    course = Course(bench, wanted, Budget(trials, hours, jobs), seed)
    say(report.plan(bench, wanted, course.count, whole=course.is_whole))
    say(report.expected(bench, course.ahead(), jobs, len(course.trials)))
    if dry_run:
        return
    try:
        with runner.ending(course.running):
            course.work()
            say(report.trials(bench, wanted, course.trials))
            best = course.best()
            if best and len(wanted) == 1:
                say(report.tested(bench, wanted[0], best, course.trials, course.test(best)))
    except KeyboardInterrupt:
        raise UserError(
            "interrupted: what has run is kept, and the same command continues"
        ) from None
    if best is None:
        raise UserError(report.nearest_miss(bench, course.trials))


def gates_of(bench: Bench) -> Values:
    """Return the gates of the commit, by metric and kind."""
    params = bench.head.params
    return {k.removeprefix(GATES): v for k, v in params.items() if k.startswith(GATES)}


def say(lines: Iterable[str]) -> None:
    """Print lines at once, also into a pipe."""
    print("\n".join(lines), flush=True)
