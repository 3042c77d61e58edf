"""The page: everything that was found out, in words and tables, as Markdown and as HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt

from lab.review import charts
from lab.review.changes import Answer, Metric, Stage, machines_of
from lab.review.gates import Verdict
from lab.review.intervals import in_both
from lab.review.meanings import MEANINGS
from lab.review.revisions import Revision
from lab.review.stages import OutOfDate
from stages.scoring.predictions import MODELS

TEMPLATE = "page.md.j2"
LONGEST = 300  # characters of an answer that are shown
# not every browser has a font with emoji
SIGNS = {"✅": '<b class="pass">✔</b>', "❌": '<b class="fail">✘</b>'}
STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Review:
    """Everything that the page says."""

    base: Revision
    head: Revision
    described: tuple[str, str]
    parameters: list[tuple[str, object, object]]
    files: list[str]
    metrics: list[Metric]
    verdicts: list[Verdict]
    stale: list[OutOfDate]
    stages: list[Stage]
    answers: list[Answer]
    shown: int
    prompts: int
    comparable: bool
    seeds: str  # what training noise was measured on, empty where it was not

    @property
    def passed(self) -> bool:
        """Whether every gate passes and dvc.lock is what code and parameters ask for."""
        return not self.stale and all(verdict.passed for verdict in self.verdicts)

    @property
    def moved(self) -> list[Metric]:
        """The metrics that differ."""
        return [metric for metric in self.metrics if metric.verdict != "same"]

    @property
    def headline(self) -> str:
        """Whether it is better, in one sentence, judged by the metrics that noise cannot explain."""
        if not self.moved:
            return "**Nothing changed** in the results."
        mine = [metric for metric in self.metrics if not metric.name.endswith(MODELS["base"])]
        others = [metric for metric in self.metrics if metric not in mine]
        if sure := in_one(mine, "surely {}"):
            return f"{sure} beyond noise."
        # what is sure of the model without its adapter is said too: no line may deny it
        found = (
            [f"without its adapter the model is {said}"]
            if (said := ways(others, "surely {}"))
            else []
        )
        if prompts := in_one(mine, "{} beyond the prompts"):
            found = [
                f"{prompts} as far as test prompts tell; training seeds were not measured",
                *found,
            ]
            return f"{'; '.join(found)}."
        start = "**No difference that is sure**" + (" with the adapter" if found else "")
        return f"{'; '.join([f'{start}: noise could explain these changes', *found])}."

    @property
    def machines(self) -> list[tuple[str, str]]:
        """On which machine the stages of either side ran, in words."""
        sides = (("before", self.base), ("after", self.head))
        return [(side, in_words(machines_of(revision))) for side, revision in sides]

    @property
    def elsewhere(self) -> list[str]:
        """The stages that ran on different machines before and after."""
        return [stage.name for stage in self.stages if stage.moved]

    @property
    def asked_both(self) -> int:
        """How many prompts both revisions were asked."""
        return in_both(self.base.predictions, self.head.predictions)

    @property
    def tally(self) -> dict[str, int]:
        """How many answers are newly right, newly wrong and reworded."""
        found = [answer.verdict for answer in self.answers]
        return {word: found.count(word) for word in ("newly right", "newly wrong", "reworded")}


def in_one(metrics: list[Metric], verdict: str) -> str:
    """Say in which metrics it is better or worse by a verdict such as "surely {}", nothing if in none."""
    found = [way for way in ("better", "worse") if names(metrics, verdict.format(way))]
    if not found:
        return ""
    return f"**{found[0].title() if len(found) == 1 else 'Mixed'}**: {ways(metrics, verdict)}"


def ways(metrics: list[Metric], verdict: str) -> str:
    """List the metrics that are better and those that are worse by a verdict."""
    listed = {way: names(metrics, verdict.format(way)) for way in ("better", "worse")}
    return ", ".join(f"{way} in {found}" for way, found in listed.items() if found)


def names(metrics: Iterable[Metric], verdict: str) -> str:
    """List the metrics that have a verdict."""
    return ", ".join(f"`{metric.name}`" for metric in metrics if metric.verdict == verdict)


def in_words(machines: dict[str, list[str]]) -> str:
    """Name the machines of a revision, and their stages where there are several machines."""
    if len(machines) < 2:
        return next(iter(machines), "not recorded")
    return "; ".join(f"{machine} ({', '.join(stages)})" for machine, stages in machines.items())


def markdown(review: Review) -> str:
    """Return the page as GitHub shows it in a pull request."""
    environment = Environment(  # noqa: S701  # Markdown: `cell` escapes what would break a table
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(cell=cell, figure=figure, signed=signed, megabytes=megabytes)
    environment.globals.update(
        meanings=MEANINGS, sparkline=charts.sparkline, loss=charts.loss_curves
    )
    return environment.get_template(TEMPLATE).render(review=review)


def html(review: Review) -> str:
    """Return the page for a browser, with the plots, in one file that needs no network."""
    renderer = MarkdownIt("commonmark", {"html": True}).enable("table")
    body = renderer.render(markdown(review))
    for emoji, sign in SIGNS.items():
        body = body.replace(emoji, sign)
    before, mark, after = body.partition("<h2>Answers")
    plots = f"<h2>Plots</h2>\n{charts.in_html([review.base, review.head])}\n"
    page = charts.PAGE.read_text(encoding="utf-8").replace("<title>Plots", "<title>Review")
    page = page.replace("{refresh_tag}", f"<style>{STYLE}</style>")
    return page.replace("{plot_divs}", before + plots + mark + after)


def cell(text: object) -> str:
    """Keep a text inside its table cell, as it is: no markup, no mention of anybody."""
    words = " ".join(str(text).split())
    words = words if len(words) <= LONGEST else f"{words[:LONGEST]}…"
    plain = re.sub(r"[\\`*_\[\]<>|~#!&$]", lambda found: f"&#{ord(found.group())};", words)
    return plain.replace("@", "@&#8203;").replace("://", "&#58;//") or "—"


def figure(value: float | None) -> str:
    """Write a number as `dvc metrics diff` does."""
    return "—" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def signed(value: float | None, digits: int = 4) -> str:
    """Write a change with its sign; metrics have four decimals, so what is smaller is none."""
    return "—" if value is None else f"{round(value, 4):+.{digits}g}"


def megabytes(size: int) -> str:
    """Write bytes as megabytes."""
    return f"{size / 1e6:.1f}" if size else "—"
