"""The heavy stages at Phi-3.5-mini's shape (3.82B random parameters) on one GPU, beside its limit.

    python -m benchmarks.full_scale [FOLDER]     # works in FOLDER; needs an NVIDIA GPU and 20 GB of disk

Time and memory only: the weights are noise. Limits are counted operations over the rates of large matrix
products in bfloat16 and in float32, measured in the same run.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.machine import ROOT, keep
from benchmarks.workplace import run_stage, write_params
from stages.core.files import read_json
from stages.text.chats import answer_ids, load_tokenizer, prompt_ids
from stages.text.conversation import Conversation

TOKENS_A_ROW, ROWS_A_STEP, STEPS = 1024, 4, 100
SEQUENCES, LENGTH = 128, 512  # that calibrate
CHAIN = ["fetch", "prepare", "quantize", "finetune", "optimize", "adapt", "evaluate", "report"]
COMMON = [
    "model=phi35_mini_shape",
    f"quantize.calibration_sequences={SEQUENCES}",
    f"quantize.calibration_length={LENGTH}",
    "quantize.perplexity_sequences=0",
    "data.path=long.jsonl",
    "optimize=cuda_int4",
    "evaluate=quick",
]
TRAINING = [
    f"finetune.max_steps={STEPS}",
    f"finetune.batch_size={ROWS_A_STEP}",
    f"finetune.max_length={TOKENS_A_ROW + 256}",
    f"finetune.eval_steps={STEPS}",
    "finetune.validation_rows=4",
    "data.validation_share=0.02",
    "data.test_share=0.02",
]


def main() -> None:
    """Work in the folder that is named, or in a temporary one."""
    if sys.argv[1:]:
        measure(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            measure(Path(scratch))


def measure(folder: Path) -> None:
    """Measure the limit, then every stage in turn, and keep the figures."""
    figures: dict[str, Any] = {
        "matmul_tflops": round(matmul_rate(torch.bfloat16) / 1e12),
        "float32_matmul_tflops": round(matmul_rate(torch.float32) / 1e12),
    }
    figures["fetch"] = fetch_with_long_rows(folder, *COMMON, *TRAINING)
    figures["prepare"] = run_stage("prepare", folder)
    figures["quantize"] = run_stage("quantize", folder) | awq_limit(folder, figures)
    figures["finetune"] = finetune(folder, figures)
    for stage in ("optimize", "adapt", "evaluate", "report"):
        figures[stage] = run_stage(stage, folder)
    figures["chain_seconds"] = round(sum(figures[stage]["wall_seconds"] for stage in CHAIN), 1)
    keep("full_scale", figures)
    packed = ["finetune.base=packed", "finetune.gradient_checkpointing=true"]
    figures["finetune_packed"] = finetune(folder, figures, *packed)
    keep("full_scale", figures)
    print(json.dumps(figures, indent=2))


def matmul_rate(dtype: torch.dtype, size: int = 8192, repeats: int = 20) -> float:
    """Return the operations per second of a product of [size, size] matrices."""
    left, right = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        left @ right
    torch.cuda.synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - started)


def fetch_with_long_rows(folder: Path, *settings: str) -> dict[str, Any]:
    """Make the model and the rows that it trains on in a folder; return what the model cost."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "data/travel.jsonl", folder / "data")
    write_params(folder, *settings)
    cost = run_stage("fetch", folder)
    write_long_rows(folder)
    return cost


def write_long_rows(folder: Path, count: int = 460) -> None:
    """Write rows of TOKENS_A_ROW tokens, chat template included, made of the travel answers."""
    tokenizer, draw = load_tokenizer(folder / "models/base"), random.Random(0)
    lines = (folder / "data/travel.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["response"] for line in lines]
    with (folder / "long.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {"prompt": f"Story {number}?", "response": draw.choice(answers) + " "}
            while tokens_of(tokenizer, row) < TOKENS_A_ROW:
                row["response"] += draw.choice(answers) + " "
            while tokens_of(tokenizer, row) > TOKENS_A_ROW:
                row["response"] = row["response"][:-1]
            file.write(json.dumps(row) + "\n")


def tokens_of(tokenizer, row: dict[str, str]) -> int:
    """Return the tokens of a row as training sees it."""
    turns = [("user", row["prompt"]), ("assistant", row["response"])]
    chat = Conversation([{"role": role, "content": text} for role, text in turns])
    return len(prompt_ids(tokenizer, chat)) + len(answer_ids(tokenizer, chat))


def finetune(folder: Path, figures: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """Train, and set its operations beside the limit."""
    write_params(folder, *COMMON, *TRAINING, *overrides)
    cost = run_stage("finetune", folder)
    training = read_json(folder / "metrics/speed/training.json")
    tokens = training["tokens_per_second"] * training["seconds"]
    # forward, and backward to the activations: the base's own gradients are not needed
    operations = 4 * linear_parameters(folder) * tokens
    rate = figures["matmul_tflops"] * 1e12
    return cost | {
        "training": training,
        "limit_seconds": round(operations / rate, 1),
        "model_flop_utilisation": round(operations / training["seconds"] / rate, 3),
    }


def linears(folder: Path) -> list[tuple[int, int, int]]:
    """Return (count of groups with this input, out, in) of the decoder's fused linears."""
    config = AutoConfig.from_pretrained(folder / "models/base")
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = hidden * (1 + 2 * config.num_key_value_heads / config.num_attention_heads)
    shapes = [(int(attention), hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    return [(config.num_hidden_layers, *shape) for shape in shapes]


def linear_parameters(folder: Path) -> int:
    """Return the weights that every token is multiplied with in the decoder layers."""
    return sum(layers * out * into for layers, out, into in linears(folder))


def awq_limit(folder: Path, figures: dict[str, Any]) -> dict[str, float]:
    """Return the seconds that AWQ's matrix products alone take at the measured rates.

    In bfloat16 the calibration text runs through every layer; in float32 its Gram matrix, [in, in], is
    summed and factorized (Cholesky, inverse, Cholesky: 4/3 in³), and every error is spread over the columns
    after it (out·in²). The model's own text, the search for scales and rounding itself are not in it.
    """
    tokens = SEQUENCES * LENGTH
    fast = sum(layers * 2 * tokens * out * into for layers, out, into in linears(folder))
    exact = sum(
        layers * (2 * tokens * into**2 + out * into**2 + 4 / 3 * into**3)
        for layers, out, into in linears(folder)
    )
    rates = figures["matmul_tflops"] * 1e12, figures["float32_matmul_tflops"] * 1e12
    return {"limit_seconds": round(fast / rates[0] + exact / rates[1], 1)}


if __name__ == "__main__":
    main()
