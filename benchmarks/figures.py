"""Fill in the figures of README and docs from the JSON that holds them: one source for every number.

    python -m benchmarks.figures            # what `make docs` runs; a test says when it is due

A figure in a sentence stands between two comments, of which the first says where it comes from:

    <!--{merge.json task_32.chrf.merged .1f}-->85.5<!--/-->

A table has its template in a comment in front of it:

    <!-- figures
    | chrF | {merge.json task_32.chrf.merged .1f} |
    -->

    | chrF | 85.5 |

    <!-- /figures -->

No line may begin with the first kind: Markdown takes such a line for HTML.

In braces: the file (a bare name lies in benchmarks/results), the path of keys, and how Python is to format it
(`g` if nothing is said). `interval METRIC` is the interval of a metric by its prompts, `family NAME.EXPORT`
how far a model family's export is from PyTorch, `contest NAME` and `step NAME` what benchmarks.rounding
found, `derived NAME` one of DERIVED below. Whoever reads the page sees the figures alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

from stages.core.files import read_json
from stages.scoring.bootstrap import intervals
from stages.scoring.predictions import read_predictions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INLINE = re.compile(r"<!--(\{[^{}]*\})-->.*?<!--/-->", re.DOTALL)
BLOCK = re.compile(r"<!-- figures\n(.*?)-->\n.*?<!-- /figures -->", re.DOTALL)
PLACE = re.compile(r"\{([^{}]*)\}")


def main() -> None:
    """Fill every page, and say which changed."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            page.write_text(filled, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} has other figures now")


def fill(text: str) -> str:
    """Return a page with every figure as its source has it. Raises KeyError for one that has none."""
    text = BLOCK.sub(
        lambda found: (
            f"<!-- figures\n{found[1]}-->\n\n{PLACE.sub(value, found[1])}\n<!-- /figures -->"
        ),
        text,
    )
    return INLINE.sub(lambda found: f"<!--{found[1]}-->{PLACE.sub(value, found[1])}<!--/-->", text)


def without_figures(text: str) -> str:
    """Return a page without what is filled in."""
    return INLINE.sub("", BLOCK.sub("", text))


def value(place: re.Match[str]) -> str:
    """Return what stands for a pair of braces."""
    source, path, *how = place[1].split(" ")
    if source == "interval":
        low, high = of_prompts()[path]
        return f"{low:.3g} to {high:.3g}"
    if source in PHRASES:
        return PHRASES[source](path)
    found = DERIVED[path]() if source == "derived" else look_up(source, path)
    return format(found, how[0] if how else "" if isinstance(found, str) else "g")


def look_up(source: str, path: str) -> Any:
    """Return the value of a JSON file at a path of keys."""
    found = read(source if "/" in source else f"benchmarks/results/{source}")
    for key in path.split("."):
        if not isinstance(found, dict) or key not in found:
            raise KeyError(f"{source} has no {path}")
        found = found[key]
    return found


def differences(path: str) -> str:
    """Return the largest difference of a logit, and the answers that are equal; without adapter, with one."""
    found = look_up("architectures.json", path)
    plain, adapted = (f"{found[key]:.2g}" for key in ("logits", "logits_adapter"))
    return f"{plain}, {adapted}; {found['answers']}, {found['answers_adapter']}"


def in_contest(name: str) -> str:
    """Return a contestant's cells: on prose and on task text, KL and the share of RTN's that is won back."""
    cells = []
    for divergence in (prose, task):
        ours, plain = (
            [divergence(draw) for draw in look_up("rounding.json", f"contest.{each}").values()]
            for each in (name, "rtn")
        )
        won = [100 * (1 - each / plain[0]) for each in ours]
        cells += [f"{median(ours):.3f}", f"{median(won):.0f} % ({min(won):.0f} to {max(won):.0f})"]
    return " | ".join(cells)


def of_step(name: str) -> str:
    """Return a step's cells: the mean change of KL on prose, where it fell, the change on task text."""
    draws, before = (look_up("rounding.json", path) for path in (f"steps.{name}", "contest.ours"))
    changes = {
        divergence: [divergence(draws[draw]) / divergence(before[draw]) - 1 for draw in draws]
        for divergence in (prose, task)
    }
    fell = sum(change < 0 for change in changes[prose])
    return (
        f"{100 * mean(changes[prose]):+.1f} % | {fell} of {len(draws)} | "
        f"{100 * mean(changes[task]):+.1f} %"
    )


def prose(figures: dict[str, Any]) -> float:
    """Return the mean KL over the tokens of news and documentation."""
    tokens = look_up("rounding.json", "contest.tokens")
    weighted = sum(tokens[text] * figures[text]["kl"] for text in ("news", "docs"))
    return weighted / (tokens["news"] + tokens["docs"])


def task(figures: dict[str, Any]) -> float:
    """Return the mean KL over the tokens of task text."""
    return figures["task"]["kl"]


@cache
def read(source: str) -> Any:
    """Read a JSON file once."""
    return read_json(ROOT / source)


@cache
def of_prompts() -> dict[str, tuple[float, float]]:
    """Return the interval of every metric that is made of prompts."""
    return intervals(read_predictions(ROOT / "metrics/predictions.jsonl"))


def recovered() -> float:
    """Return the percentage of what plain rounding loses on the task's text that the method wins back."""
    float_, rtn, ours = (
        look_up("metrics/quality.json", f"task_perplexity_{kind}")
        for kind in ("float", "rtn", "quantized")
    )
    return 100 * (rtn - ours) / (rtn - float_)


def stages(key: str, source: str, path: str = "") -> list[float]:
    """Return a figure of every stage but `training`, which is a part of finetune."""
    costs = look_up(source, path) if path else read(source)
    return [cost[key] for name, cost in costs.items() if name != "training"]


def seconds_a_stage() -> str:
    """Return the seconds of every stage, in order, on a quiet machine."""
    found = stages("seconds", "pipeline_cpu.json", "run.costs")
    return ", ".join(f"{each:.0f}" if each >= 1 else "under 1" for each in found)


def rate(transfer: str) -> float:
    """Return the rate of DVC's transfer as a share of its peer's."""
    peer, ours = (
        look_up("remote.json", f"{transfer}.{name}_s") for name in ("azure_storage_blob", "dvc")
    )
    return peer / ours


QUALITY = "metrics/quality.json"


def gpu_site_us() -> float:
    """Return the microseconds that our operator's kernels take at one projection of a step."""
    kernels = look_up("gpu_adapters.json", "kernels")
    ours = [kernels["lower_one"], kernels["raise_one"]]
    return sum(each["us"] for each in ours) / ours[0]["count"]


PHRASES = {"family": differences, "contest": in_contest, "step": of_step}

DERIVED: dict[str, Callable[[], Any]] = {
    "task_loss_recovered": recovered,
    "prose_loss_recovered": lambda: 100 * look_up(QUALITY, "rtn_loss_recovered"),
    "run_minutes": lambda: sum(stages("seconds", "pipeline_cpu.json", "run.costs")) / 60,
    "run_seconds": seconds_a_stage,
    "run_memory": lambda: max(stages("peak_memory_gib", "pipeline_cpu.json", "run.costs")),
    "merged_mb": lambda: look_up("merge.json", "merged.bytes") / 1e6,
    "adapter_mb": lambda: look_up("merge.json", "adapter.bytes") / 1e6,
    "push_rate": lambda: rate("2000_mb.push"),
    "pull_rate": lambda: rate("2000_mb.pull"),
    "gpu_base_gb": lambda: look_up("gpu_adapters.json", "gpu_mib_base") * 2**20 / 1e9,
    "gpu_site_us": gpu_site_us,
    "gpu_three_gb": lambda: look_up("gpu_adapters.json", "gpu_mib_three_adapters") * 2**20 / 1e9,
}


if __name__ == "__main__":
    main()
