"""What 4 bits and the adapter cost on tasks that have nothing to do with the training.

    pip install -r requirements/lm_eval.txt
    python -m benchmarks.harness        # after `dvc repro`; minutes; writes benchmarks/results/harness.json

`lab benchmark` on all questions of the tasks that conf/evaluate/benchmark names.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from benchmarks.machine import keep
from lab.benchmark.command import ADAPTER, BASE, ONNX, table
from lab.benchmark.harness import run
from stages.core.settings import load_current


def main() -> None:
    """Ask every question, and keep the figures."""
    options = load_current().evaluate.benchmark.model_copy(update={"limit": None})
    figures = run(options, {"float": BASE, "4-bit": ONNX, "adapter": ADAPTER})
    keep("harness", figures)
    print("\n".join(table(figures)))


if __name__ == "__main__":
    main()
