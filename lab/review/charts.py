"""Charts: the plots of dvc.yaml for the HTML page, lines of text for the Markdown one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from dvc_render.vega import VegaRenderer

from lab.review.revisions import Revision

TEMPLATES = Path(".dvc/plots")
PAGE = TEMPLATES / "page.html"
LOSSES = "metrics/plots/loss.csv"
BLOCKS = "▁▂▃▄▅▆▇█"


def in_html(revisions: list[Revision]) -> str:
    """Return the plots of dvc.yaml over several revisions, as `dvc plots diff` draws them."""
    plots = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["plots"]
    named = [item for plot in plots for item in plot.items()]
    return "\n".join(chart(name, plot, revisions) for name, plot in named)


def chart(name: str, plot: dict[str, Any], revisions: list[Revision]) -> str:
    """Return one plot as HTML, nothing where no revision has its data."""
    ((file, field),) = plot["y"].items()
    points = [{**row, "rev": r.name} for r in revisions for row in r.table(file)]
    looks = {key: value for key, value in plot.items() if key != "y"}
    renderer = VegaRenderer(points, name, y=field, template_dir=str(TEMPLATES), **looks)
    return renderer.generate_html() if points else ""


def sparkline(values: list[float]) -> str:
    """Draw numbers as a line of blocks, highest to lowest."""
    low, high = min(values), max(values)
    scale = (len(BLOCKS) - 1) / ((high - low) or 1)
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


def loss_curves(revision: Revision) -> dict[str, list[float]]:
    """Return the losses of every split, in the order of their steps."""
    curves: dict[str, list[float]] = {}
    for row in revision.table(LOSSES):
        if "split" not in row or not isinstance(row.get("loss"), float):
            raise revision.unreadable(LOSSES, "has a row without split or loss")
        curves.setdefault(row["split"], []).append(row["loss"])
    return curves
