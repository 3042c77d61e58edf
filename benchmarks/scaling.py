"""LoRA on several GPUs of one host: tokens per second, and their efficiency against one GPU.

    python -m benchmarks.scaling --gpus 1 2 4 8          # at Phi-3.5-mini's shape; 20 GB of disk
    python -m benchmarks.scaling --model tiny --gpus 1 2 --steps 4    # on CPU processes: does it run?

Every GPU takes the same rows a step, so N of them see the same tokens in an Nth of the steps. The
validation losses after all tokens stand side by side. NVLink multicast stays off: not every host that
lends some of its GPUs allows it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.full_scale import ROWS_A_STEP, TOKENS_A_ROW, fetch_with_long_rows
from benchmarks.machine import keep
from benchmarks.workplace import run_stage, write_params
from stages.running import read_json

SETTINGS = [
    "quantize=rtn",
    "quantize.perplexity_sequences=0",
    "data.path=long.jsonl",
    "data.validation_share=0.02",
    "data.test_share=0.02",
    "finetune.validation_rows=8",
    f"finetune.max_length={TOKENS_A_ROW + 256}",
]


def main() -> None:
    """Make the model once, train it on every number of GPUs, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--model", default="phi35_mini_shape", help="a name of conf/model")
    parser.add_argument("--steps", type=int, default=96, help="of one GPU; N take an Nth")
    options = parser.parse_args()
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(Path(scratch), options)
    keep(f"scaling_{options.model}", figures)
    print(json.dumps(figures, indent=2))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second, efficiency and the final validation loss by number of GPUs."""
    common, counts = [f"model={options.model}", *SETTINGS], options.gpus
    fetch_with_long_rows(folder, *common)
    for stage in ("prepare", "quantize"):
        run_stage(stage, folder)
    figures = {f"gpus_{count}": train(folder, common, count, options.steps) for count in counts}
    alone = figures[f"gpus_{counts[0]}"]["tokens_per_second"] / counts[0]
    for count in counts:
        speed = figures[f"gpus_{count}"]["tokens_per_second"]
        figures[f"gpus_{count}"]["efficiency"] = round(speed / count / alone, 3)
    return figures


def train(folder: Path, common: list[str], count: int, steps: int) -> dict[str, Any]:
    """Train on some GPUs until all tokens are seen."""
    steps //= count
    write_params(
        folder,
        *common,
        f"finetune.num_processes={count}",
        f"finetune.batch_size={count * ROWS_A_STEP}",
        f"finetune.max_steps={steps}",
        f"finetune.eval_steps={steps}",
    )
    run_stage("finetune", folder)
    training = read_json(folder / "metrics/runtime/training.json")
    losses = read_json(folder / "metrics/raw/finetune.json")["validation"]
    return {"steps": steps, **training, "validation_loss": losses[-1]["loss"]}


if __name__ == "__main__":
    main()
