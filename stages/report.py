"""Collect every stage's raw metrics into what git tracks and people review.

    python -m stages.report

Writes metrics/quality.json, size.json and speed.json (`dvc metrics diff`), metrics/quality.md (every quality
figure with its interval), metrics/costs.json (seconds and peak memory of every stage), metrics/plots
(`dvc plots diff`), metrics/predictions.md, a table of question, reference, base and adapter, and
metrics/predictions.jsonl, every prompt's scores, from which `lab review` tells a change from noise.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from stages.core.files import read_json, write_json, written_beside
from stages.core.running import run
from stages.core.settings import Settings
from stages.scoring.bootstrap import all_terms, intervals
from stages.scoring.predictions import (
    CONTROL,
    MODELS,
    Parity,
    Prediction,
    as_jsonl,
    read_predictions,
)

METRICS = Path("metrics")
RAW = METRICS / "raw"
SPEED = METRICS / "speed"
STAGES = ("fetch", "prepare", "quantize", "finetune", "optimize", "adapt", "evaluate")
Metrics = dict[str, float]


def report(_: Settings) -> str:
    """Read the raw metrics, split them by subject, write them."""
    quantized, finetuned, evaluated = (
        read_json(RAW / f"{stage}.json") for stage in ("quantize", "finetune", "evaluate")
    )
    predictions = read_predictions(RAW / "predictions.jsonl")
    quality, size = quality_and_size({**quantized, **evaluated})
    quality["validation_loss"] = finetuned["validation"][-1]["loss"]
    speed = {name: steady(value) for name, value in read_json(SPEED / "decode.json").items()}
    for name, metrics in {"quality": quality, "size": size, "speed": speed}.items():
        write_json(METRICS / f"{name}.json", metrics)
    write_json(METRICS / "costs.json", costs())
    write_text(METRICS / "quality.md", quality_table(quality, predictions))
    write_plots(finetuned, quality, speed)
    write_text(METRICS / "predictions.md", predictions_table(predictions))
    write_text(METRICS / "predictions.jsonl", as_jsonl(predictions))
    return f"{METRICS}/quality.json, size.json, speed.json, plots, predictions.md ({len(predictions)} rows)"


def quality_and_size(metrics: Metrics) -> tuple[Metrics, Metrics]:
    """Return the figures of quality, and the sizes in MB: a few bytes more or less are no change."""
    sizes = {name: value for name, value in metrics.items() if name.startswith("bytes_")}
    quality = {name: value for name, value in metrics.items() if name not in sizes}
    return quality, {f"{n.removeprefix('bytes_')}_mb": round(v / 1e6, 1) for n, v in sizes.items()}


def steady(value: float) -> float:
    """Round to two significant digits: the third is another one on every run."""
    return float(f"{value:.2g}")


def costs() -> dict[str, Metrics]:
    """Return what every stage took, by its name."""
    found = {stage: read_json(SPEED / f"{stage}.json") for stage in STAGES}
    return {**found, "training": read_json(SPEED / "training.json")}


def quality_table(quality: Metrics, predictions: list[Prediction]) -> str:
    """Return a Markdown table: every figure, with the adapter and without, its 95 % interval and its n."""
    sure, terms = intervals(predictions), all_terms(predictions)
    lines = ["| metric | value | 95 % interval | n | without adapter | 95 % interval | n |"]
    lines.append("|" + "---|" * 7)
    for name in (name for name in quality if not name.endswith("_base")):
        cells = [name]
        for each in (name, f"{name}_base"):
            count = f"{terms[each][1].sum():.0f}" if each in terms else ""
            cells += [figure(quality, each), interval(sure, each), count]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(quality: Metrics, name: str) -> str:
    """Return a figure as text, nothing where it was not measured."""
    return f"{quality[name]:g}" if name in quality else ""


def interval(sure: dict[str, tuple[float, float]], name: str) -> str:
    """Return an interval as text, nothing for a figure that is not made of prompts."""
    return f"{sure[name][0]:.3g} to {sure[name][1]:.3g}" if name in sure else ""


def write_plots(curves: dict[str, list[Metrics]], quality: Metrics, speed: Metrics) -> None:
    """Write the data of the three plots that dvc.yaml names."""
    losses = [[split, p["step"], p["loss"]] for split, points in curves.items() for p in points]
    write_csv(METRICS / "plots/loss.csv", ["split", "step", "loss"], losses)
    write_csv(
        METRICS / "plots/scores.csv", ["kind", "model", "exact_match"], exact_matches(quality)
    )
    write_json(METRICS / "plots/tradeoff.json", tradeoff(speed, quality))


def exact_matches(quality: Metrics) -> list[list[Any]]:
    """Return the exact match of every kind of prompt: kind, model, value."""
    return [
        [kind, model, quality[f"{kind}_exact_match{suffix}"]]
        for kind in kinds_of(quality)
        for model, suffix in MODELS.items()
    ]


def kinds_of(quality: Metrics) -> list[str]:
    """Return the kinds of prompts with an exact match: recall and transfer, or test; control."""
    ending = "_exact_match"
    return sorted(name.removesuffix(ending) for name in quality if name.endswith(ending))


def tradeoff(speed: Metrics, quality: Metrics) -> list[dict[str, Any]]:
    """Return speed against quality, a point with and one without the adapter, for `dvc plots`."""
    kinds = [kind for kind in kinds_of(quality) if kind != CONTROL]  # which nobody trains for
    return [
        {
            "model": model,
            "decode_tokens_per_s_p50": speed[f"decode_tokens_per_s_p50{suffix}"],
            "time_to_first_token_ms": speed[f"time_to_first_token_ms{suffix}"],
            "exact_match": round(
                sum(quality[f"{kind}_exact_match{suffix}"] for kind in kinds) / max(1, len(kinds)),
                4,
            ),
        }
        for model, suffix in MODELS.items()
    ]


def predictions_table(predictions: list[Prediction]) -> str:
    """Return the predictions as a Markdown table, and whether PyTorch would answer otherwise."""
    lines = ["| kind | question | reference | base | adapter | PyTorch |", "|" + "---|" * 6]
    for each in predictions:
        texts = (each.kind, each.question, each.reference, each.base, each.adapter)
        lines.append(f"| {' | '.join(map(cell, [*texts, explain(each.parity)]))} |")
    return "\n".join(lines) + "\n"


def cell(text: str | None) -> str:
    """Keep a text, if there is one, inside its table cell."""
    return " ".join((text or "").split()).replace("|", "\\|")


def explain(parity: Parity | None) -> str:
    """Say how PyTorch's greedy answer differs from the ONNX model's, if it was asked."""
    if parity is None:
        return ""
    if parity.identical:
        return "same"
    return f"other token {parity.token} (logit gap {parity.logit_gap})"


def write_csv(path: Path, columns: list[str], rows: list[list[Any]]) -> None:
    """Write a table, all or nothing."""
    with written_beside(path) as beside, beside.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([columns, *rows])


def write_text(path: Path, text: str) -> None:
    """Write a text, all or nothing."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    run(report)
