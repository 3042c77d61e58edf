"""Finetune on several GPUs of one machine beside one of them, and a base that is spread over them.

    python -m benchmarks.several_gpus                     # 2 GPUs, 40 GB of disk, 15 minutes
    python -m benchmarks.several_gpus --part small        # only the 3.8B shape; large: only the 32B one
    python -m benchmarks.several_gpus --model tiny --large tiny --steps 10 --tokens 64     # anywhere, on CPUs

Random weights: time and memory only. One GPU and several train on the same rows in the same order, so that
their losses are the same but for rounding. Writes benchmarks/results/several_gpus.json after every run, and
keeps what it holds of other runs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from benchmarks.machine import RESULTS, ROOT, keep
from benchmarks.workplace import run_stage, write_params
from stages.core.files import read_json
from stages.weights.checkpoint import empty_model

SHAPES = {
    # Qwen2.5-32B's, without its biases
    "32b": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 152064,
    },
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 512},
}
GROUP = 128


def main() -> None:
    """Measure what is asked for, in a folder of its own unless one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["all", "small", "large"], default="all")
    parser.add_argument("--model", default="phi35_mini_shape")
    parser.add_argument("--large", choices=[*SHAPES], default="32b")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=1024, help="of a row")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16], help="of a step")
    parser.add_argument("--compile", action="store_true", help="finetune.compile=true too")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (asked.folder or Path(scratch)).resolve()
        if asked.part in ("all", "small"):
            measure_small(folder / "small", asked)
        if asked.part in ("all", "large"):
            measure_large(folder / "large", asked)
    print(json.dumps(read_json(RESULTS / "several_gpus.json"), indent=2))


def measure_small(folder: Path, asked: argparse.Namespace) -> None:
    """Train the same rows in one process and in several."""
    settings = [f"model={asked.model}", *common(asked), f"finetune.max_steps={asked.steps}"]
    settings += [f"finetune.eval_steps={asked.steps}"]
    make_small(folder, settings, asked)
    for compiled in (False, True) if asked.compile else (False,):
        for rows in asked.rows:
            both = [
                *settings,
                f"finetune.batch_size={rows}",
                f"finetune.compile={compiled}".lower(),
            ]
            runs = {
                n: finetune(folder, *both, f"finetune.processes={n}") for n in (1, asked.processes)
            }
            one, several = runs[1], runs[asked.processes]
            several["times_the_speed_of_one"] = round(
                one["step_seconds"] / several["step_seconds"], 3
            )
            several["validation_loss_less_ones"] = round(
                several["validation_loss"] - one["validation_loss"], 4
            )
            name = f"{asked.model}_{rows}_rows" + "_compiled" * compiled
            kept = {"tokens_a_row": asked.tokens, "processes": asked.processes}
            keep_also(name, kept | {"one": one, "several": several})


def measure_large(folder: Path, asked: argparse.Namespace) -> None:
    """Train ten steps on a base that is spread over the GPUs: in the fast dtype, and packed."""
    rows = max(asked.processes, 4)
    settings = ["model=tiny", *common(asked), "finetune.max_steps=10", "finetune.eval_steps=10"]
    settings += [f"finetune.batch_size={rows}", f"finetune.processes={asked.processes}"]
    make_small(folder, settings, asked)
    weights = enlarge(folder / "models/quantized", SHAPES[asked.large])
    sharded = ["finetune.shard=true", "finetune.gradient_checkpointing=true"]
    for base in ("dequantized", "packed"):
        run = finetune(folder, *settings, *sharded, f"finetune.base={base}")
        keep_also(
            f"{asked.large}_sharded_{base}",
            {"tokens_a_row": asked.tokens, "rows": rows, "processes": asked.processes}
            | {"weights": weights, "several": run},
        )


def common(asked: argparse.Namespace) -> list[str]:
    """Return the settings of all runs."""
    return [
        "quantize=rtn",
        "quantize.perplexity_sequences=0",
        "data.path=long.jsonl",
        f"finetune.max_length={asked.tokens}",
        "finetune.validation_rows=8",
        "finetune.lr=2e-4",
        "data.validation_share=0.05",
        "data.test_share=0.05",
    ]


def make_small(folder: Path, settings: list[str], asked: argparse.Namespace) -> None:
    """Make a model of random weights, pack it, and prepare rows; what a folder holds already stays."""
    if (folder / "models/quantized").exists():
        return
    (folder / "data").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "data/travel.jsonl", folder / "data")
    shutil.copy(ROOT / "data/heldout.txt", folder / "data")
    write_rows(folder / "long.jsonl", asked.tokens)
    write_params(folder, *settings)
    for stage in ("fetch", "prepare", "quantize"):
        run_stage(stage, folder)


def write_rows(file: Path, tokens: int, count: int = 400) -> None:
    """Write rows that are longer than `tokens`, so that training cuts all to the same length."""
    lines = (ROOT / "data/travel.jsonl").read_text(encoding="utf-8").splitlines()
    draw, answers = random.Random(0), [json.loads(line)["response"] for line in lines]
    with file.open("w", encoding="utf-8") as rows:
        for number in range(count):
            text = ""
            while len(text) < 6 * tokens:  # the small tokenizer's tokens are shorter
                text += draw.choice(answers) + " "
            rows.write(json.dumps({"prompt": f"Story {number}?", "response": text}) + "\n")


def finetune(folder: Path, *settings: str) -> dict[str, Any]:
    """Train; return what the stage and its loop cost, and the last losses."""
    write_params(folder, *settings)
    shutil.rmtree(folder / "models/.finetune", ignore_errors=True)
    cost = run_stage("finetune", folder)
    training = read_json(folder / "metrics/speed/training.json")
    losses = read_json(folder / "metrics/raw/finetune.json")
    tokens_a_step = (
        training["tokens_per_second"] * training["seconds"] / losses["train"][-1]["step"]
    )
    seconds = training.setdefault("step_seconds", training["seconds"] / losses["train"][-1]["step"])
    return {
        "step_seconds": round(seconds, 4),
        "tokens_per_second": round(tokens_a_step / seconds),
        "train_loss": losses["train"][-1]["loss"],
        "validation_loss": losses["validation"][-1]["loss"],
        "training": training,
        "stage": cost,
    }


def enlarge(folder: Path, shape: dict[str, int]) -> dict[str, float]:
    """Put random packed weights of another shape into a packed checkpoint; return how many there are."""
    file = folder / "config.json"
    settings = read_json(file) | shape
    settings["tie_word_embeddings"] = False
    settings["quantization_config"] |= {"group_size": GROUP, "tie_word_embeddings": False}
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "model.safetensors").unlink(missing_ok=True)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    parts: dict[str, dict[str, torch.Tensor]] = {}
    count = 0
    for name, parameter in empty_model(config).named_parameters():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "outside"
        part = parts.setdefault(layer, {})
        count += parameter.numel()
        if parameter.ndim == 1:
            part[name] = torch.ones(parameter.shape)
        else:
            part |= packed(
                name.removesuffix(".weight"), parameter.shape, 4 if layer.isdigit() else 8
            )
    size = 0
    for name, part in parts.items():
        file = folder / f"part-{name:>07}.safetensors"
        save_file({key: value.clone() for key, value in part.items()}, file)
        size += file.stat().st_size
    return {"billions": round(count / 1e9, 2), "packed_gb": round(size / 1e9, 1)}


def packed(module: str, shape: torch.Size, bits: int) -> dict[str, torch.Tensor]:
    """Return a linear's tensors by name."""
    return {f"{module}.{kind}": value for kind, value in random_linear(*shape, bits).items()}


@cache
def random_linear(out: int, into: int, bits: int) -> dict[str, torch.Tensor]:
    """Return random integers of a mean of zero, with scales that make them as wide as trained weights.

    The same in every layer: drawing all takes longer than training on them.
    """
    groups = into // GROUP
    middle = 0x88 if bits == 4 else 128
    zeros = torch.full((out, -(-groups * bits // 8)), middle, dtype=torch.uint8)
    scale = 0.02 / (4.6 if bits == 4 else 74)
    return {
        "qweight": torch.randint(256, (out, into * bits // 8), dtype=torch.uint8),
        "qzeros": zeros,
        "scales": torch.full((out, groups), scale),
    }


def keep_also(name: str, figures: dict[str, Any]) -> None:
    """Write one run's figures beside those of others."""
    file = RESULTS / "several_gpus.json"
    before = read_json(file) if file.exists() else {}
    before.pop("machine", None)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    keep("several_gpus", before | {"gpus": gpus, "links": links(), name: figures})


def links() -> list[str]:
    """Return how the GPUs are connected, as nvidia-smi says it; nothing without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    said = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True).stdout
    return [" ".join(line.split()) for line in said.splitlines() if line.startswith("GPU")]


if __name__ == "__main__":
    main()
