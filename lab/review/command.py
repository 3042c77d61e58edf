"""Review a change: what differs, whether it is better, how sure that is.

lab review                                           # this branch against where it left main
lab review main --html review.html                   # and a page for the browser
lab review --stages                                  # only: is dvc.lock current?
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lab.review import changes, page
from lab.review.gates import judge
from lab.review.intervals import intervals, same_prompts
from lab.review.revisions import WORKSPACE, Revision, changed_files, describe, find_base
from lab.review.seeds import doubts
from lab.review.stages import OutOfDate, out_of_date
from stages.core.errors import UserError
from stages.core.settings import load


def review(
    base: Annotated[
        str | None, typer.Argument(help="A commit [default: where this branch left main].")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page for the browser too.")] = None,
    answers: Annotated[int, typer.Option(min=0, help="How many changed answers to show.")] = 10,
    stages: Annotated[bool, typer.Option("--stages", help="Only check dvc.lock.")] = False,
) -> None:
    """Print what changed since BASE. Exit code 1: a gate fails or dvc.lock is out of date."""
    if not Path("dvc.yaml").is_file():
        raise UserError("no dvc.yaml here: run it in the repository's root")
    if stages:
        check(out_of_date())
        return
    found = look(find_base(base), Revision(WORKSPACE), answers)
    print(page.markdown(found))
    if html:
        write(html, page.html(found))
    if not found.passed:
        raise typer.Exit(1)


def look(base: Revision, head: Revision, shown: int) -> page.Review:
    """Find out everything that the page says."""
    tracked = inputs(head)
    sure = doubts(base, head, intervals(base.predictions, head.predictions))
    return page.Review(
        base=base,
        head=head,
        described=(describe(base), describe(head)),
        parameters=changes.parameters(base, head),
        files=[file for file in changed_files(base) if file in tracked],
        metrics=changes.metrics(base, head, sure),
        verdicts=judge(load().evaluate.gates, base.metrics, head.metrics, sure),
        stale=out_of_date(),
        stages=changes.stages(base, head),
        answers=changes.answers(base, head),
        shown=shown,
        prompts=len(head.predictions) if base.predictions else 0,
        comparable=same_prompts(base.predictions, head.predictions),
        seeds=head.noise_measured or base.noise_measured,
    )


def inputs(head: Revision) -> set[str]:
    """Return the files in git that a stage depends on, by dvc.lock."""
    if not head.lock:
        raise UserError("no stage in dvc.lock here: `dvc repro` writes it")
    return {dep["path"] for entry in head.lock.values() for dep in entry.get("deps", [])}


def write(file: Path, text: str) -> None:
    """Write a page, and the folder that it lies in. Raises `UserError` where that cannot be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {file}: {error.strerror}: give another file") from None


def check(stale: list[OutOfDate]) -> None:
    """Say which stages are out of date; exit 1 if any is."""
    if stale:
        lines = [f"{stage.stage} ({', '.join(stage.reasons)})" for stage in stale]
        raise UserError(f"dvc.lock is out of date, run `dvc repro`: {'; '.join(lines)}")
    print("dvc.lock matches code, parameters and data")
