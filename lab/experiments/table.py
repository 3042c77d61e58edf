"""Show experiments with the columns that decide: the parameters that differ, quality, size, speed.

lab exp                                              # this commit's experiments
lab exp --all-commits --sort-by recall_exact_match --sort-order desc
lab exp --csv                                        # whatever `dvc exp show` takes
"""

from __future__ import annotations

import subprocess
import sys

import typer

SETTINGS = "(model|data|quantize|finetune|optimize|evaluate)[.]"
METRICS = [
    "(recall|transfer|test)_exact_match",
    "answer_perplexity",
    "onnx_adapter_mb",
    "decode_tokens_per_s_p50",
]
# what `dvc exp show` itself puts in front, some of it only to build the first column
FRONT = ["Experiment", "State", "rev", "typ", "parent"]


def table(context: typer.Context) -> None:
    """Show experiments with what decides. Takes the words of `dvc exp show`."""
    command = [sys.executable, "-m", "dvc", "exp", "show", "--only-changed", "--no-pager"]
    done = subprocess.run([*command, "--drop", all_but(METRICS), *context.args])
    raise typer.Exit(done.returncode)


def all_but(metrics: list[str]) -> str:
    """Return the pattern of the columns to drop: all but parameters and these metrics."""
    quality = f"(metrics/.*:)?({'|'.join(metrics)})$"
    return f"(?!({'|'.join(FRONT)})$|{SETTINGS}|{quality})"
