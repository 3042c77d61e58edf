"""The results of the last run as a table that fits a terminal of 80 columns.

lab results          # what `make repro` ends with
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.core.files import read_json
from stages.report import figure, interval
from stages.scoring.bootstrap import intervals
from stages.scoring.predictions import MODELS, read_predictions

METRICS = Path("metrics")
LINE = "{:<21} {:>7} {:<19} {:>7} {:<19}"
REST = """\
in brackets: what other test prompts could change (95 %)
all figures: metrics/quality.md    every answer: metrics/predictions.md
to compare: dvc metrics diff main, or lab review, which says how sure it is"""


def results() -> None:
    """Show the results of the last run, with and without the adapter."""
    quality, size, speed = (read(f"{name}.json") for name in ("quality", "size", "speed"))
    sure = intervals(read("predictions.jsonl"))
    print(LINE.format("", "adapter", "", "base", "").rstrip())
    for name in (name for name in sure if f"{name}_base" in sure):
        cells = [
            text
            for suffix in MODELS.values()
            for text in (figure(quality, name + suffix), f"({interval(sure, name + suffix)})")
        ]
        print(LINE.format(name, *cells).rstrip())
    for name in ("decode_tokens_per_s_p50", "time_to_first_token_ms"):
        label = name.replace("_per_s_p50", "/s").replace("time_to_", "")
        print(
            LINE.format(label, figure(speed, name), "", figure(speed, f"{name}_base"), "").rstrip()
        )
    kinds = {"float": "float", "rtn": "RTN", "quantized": "4-bit"}
    measured = {label: figure(quality, f"perplexity_{kind}") for kind, label in kinds.items()}
    print("prose perplexity:", ", ".join(f"{n} {value}" for n, value in measured.items() if value))
    print("MB:", ", ".join(f"{name.removesuffix('_mb')} {mb:g}" for name, mb in size.items()))
    print(REST)


def read(name: str) -> Any:
    """Read a file of metrics/. Raises `UserError` if there is none."""
    file = METRICS / name
    if not file.is_file():
        raise UserError(
            f"no {file} here: run `dvc repro` in the repository's root, which writes it"
        )
    return read_predictions(file) if file.suffix == ".jsonl" else read_json(file)
