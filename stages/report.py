"""Collect every stage's raw metrics into what git tracks and people review.

    python -m stages.report

Writes metrics/quality.json and metrics/size.json (`dvc metrics diff`), metrics/plots (`dvc plots diff`; the
speeds in them are the last that `evaluate` measured here), metrics/predictions.md, a table of question,
reference, base and adapter, and metrics/predictions.jsonl, every prompt's scores, from which `lab review`
tells a change from noise.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from stages.places import place
from stages.running import read_json, run, write_json, written_beside
from stages.settings import Settings
from stages.summary import MODELS

QUANTIZE = Path("metrics/raw/quantize.json")  # one base for all adapters
RAW = place("metrics/raw")
METRICS = place("metrics")
LOSS = METRICS / "plots/loss.csv"
SCORES = METRICS / "plots/scores.csv"
SPEED = METRICS / "speed.json"
TRADEOFF = METRICS / "plots/tradeoff.json"
PREDICTIONS = METRICS / "predictions.md"
PROMPTS = METRICS / "predictions.jsonl"


def report(_: Settings) -> str:
    """Read the raw metrics, sort them, write them."""
    quantized = read_json(QUANTIZE)
    finetuned, evaluated = (read_json(RAW / f"{stage}.json") for stage in ("finetune", "evaluate"))
    metrics = {**quantized, **evaluated}
    quality = {name: value for name, value in metrics.items() if not name.startswith("bytes_")}
    quality["validation_loss"] = finetuned["validation"][-1]["loss"]
    write_json(METRICS / "quality.json", quality)
    write_json(METRICS / "size.json", megabytes(metrics))
    write_loss(finetuned)
    write_scores(quality)
    if SPEED.is_file():
        write_json(TRADEOFF, tradeoff(read_json(SPEED), quality))
    rows = read_predictions()
    write_predictions(rows)
    write_prompts(rows)
    return f"{METRICS}/quality.json, size.json, plots and predictions.md ({len(rows)} questions)"


def megabytes(metrics: dict[str, float]) -> dict[str, float]:
    """Return the sizes among the metrics, in MB: a few bytes more or less are no change."""
    sizes = {name: value for name, value in metrics.items() if name.startswith("bytes_")}
    return {f"{name.removeprefix('bytes_')}_mb": round(v / 1e6, 1) for name, v in sizes.items()}


def write_loss(curves: dict[str, list[dict[str, float]]]) -> None:
    """Write the loss curves as one CSV table: split, step, loss."""
    with written_beside(LOSS) as beside, beside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["split", "step", "loss"])
        for split, points in curves.items():
            writer.writerows([split, point["step"], point["loss"]] for point in points)


def write_scores(quality: dict[str, float]) -> None:
    """Write the exact match of every kind of prompt as a table: kind, model, exact_match."""
    with written_beside(SCORES) as beside, beside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["kind", "model", "exact_match"])
        for name, value in sorted(quality.items()):
            kind, found, suffix = name.partition("_exact_match")
            if found:
                writer.writerow([kind, suffix.removeprefix("_") or "adapter", value])


def tradeoff(speed: dict[str, float], quality: dict[str, float]) -> list[dict[str, Any]]:
    """Return speed against quality, a point with and one without the adapter, for `dvc plots`."""
    kinds = [name for name in quality if name.endswith("_exact_match")]
    return [
        {
            "model": model,
            "decode_tokens_per_s_p50": speed[f"decode_tokens_per_s_p50{suffix}"],
            "time_to_first_token_ms": speed[f"time_to_first_token_ms{suffix}"],
            "exact_match": round(sum(quality[kind + suffix] for kind in kinds) / len(kinds), 4),
        }
        for model, suffix in MODELS.items()
        if f"decode_tokens_per_s_p50{suffix}" in speed
    ]


def read_predictions() -> list[dict[str, Any]]:
    """Read the predictions that `evaluate` wrote."""
    lines = (RAW / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def write_predictions(rows: list[dict[str, Any]]) -> None:
    """Write the predictions as a Markdown table, with the answers that PyTorch would give otherwise."""
    with written_beside(PREDICTIONS) as beside, beside.open("w", encoding="utf-8") as stream:
        stream.write("| kind | question | reference | base | adapter | PyTorch |\n")
        stream.write("|---|---|---|---|---|---|\n")
        for row in rows:
            cells = [row["kind"], row["question"], row["reference"], row["base"], row["adapter"]]
            stream.write(f"| {' | '.join(map(cell, [*cells, explain(row['parity'])]))} |\n")


def write_prompts(rows: list[dict[str, Any]]) -> None:
    """Write the predictions with their scores, one JSON object a line, so that git shows what changed."""
    with written_beside(PROMPTS) as beside, beside.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def cell(text: str) -> str:
    """Keep a text inside its table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def explain(parity: dict[str, Any]) -> str:
    """Say how PyTorch's greedy answer differs from the ONNX model's."""
    if parity["verdict"] == "identical":
        return "same"
    return f"{parity['verdict']} at token {parity['token']} (logit gap {parity['logit_gap']})"


if __name__ == "__main__":
    run(report)
