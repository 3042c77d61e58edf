"""Finetune and quantize on several GPUs of one machine beside one, and train a base that is spread over them.

    python -m benchmarks.several_gpus                     # 2 GPUs, 40 GB of disk, 15 minutes
    python -m benchmarks.several_gpus --part small        # only the 3.8B shape; large: only the 32B one
    python -m benchmarks.several_gpus --part quantize     # only quantize, of the 3.8B shape
    python -m benchmarks.several_gpus --model tiny --large tiny --steps 10 --tokens 64     # anywhere, on CPUs

Random weights: time and memory only. One GPU and several train on the same rows in the same order, so that
their losses are the same but for rounding, and quantize to the same integers, which are compared. Writes
benchmarks/results/several_gpus.json after every run, and keeps what it holds of other runs.
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
from safetensors.torch import load_file, save_file
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
    parser.add_argument("--part", choices=["all", "small", "large", "quantize"], default="all")
    parser.add_argument("--model", default="phi35_mini_shape")
    parser.add_argument("--large", choices=[*SHAPES], default="32b")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=1024, help="of a row")
    parser.add_argument("--sequences", type=int, default=128, help="that calibrate, of 512 tokens")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16], help="of a step")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (asked.folder or Path(scratch)).resolve()
        if asked.part in ("all", "small"):
            measure_small(folder / "small", asked)
        if asked.part in ("all", "large"):
            measure_large(folder / "large", asked)
        if asked.part in ("all", "quantize"):
            measure_quantize(folder / "quantize", asked)
    print(json.dumps(read_json(RESULTS / "several_gpus.json"), indent=2))


def measure_small(folder: Path, asked: argparse.Namespace) -> None:
    """Train the same rows in one process and in several."""
    settings = [f"model={asked.model}", *common(asked), f"finetune.max_steps={asked.steps}"]
    settings += [f"finetune.eval_steps={asked.steps}"]
    make_small(folder, settings, asked)
    for rows in asked.rows:
        both = [*settings, f"finetune.batch_size={rows}"]
        one, several = (
            finetune(folder, *both, f"finetune.processes={n}") for n in (1, asked.processes)
        )
        several["times_the_speed_of_one"] = round(one["step_seconds"] / several["step_seconds"], 3)
        several["validation_loss_less_ones"] = round(
            several["validation_loss"] - one["validation_loss"], 4
        )
        kept = {"tokens_a_row": asked.tokens, "processes": asked.processes}
        keep_also(f"{asked.model}_{rows}_rows", kept | {"one": one, "several": several})


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


def measure_quantize(folder: Path, asked: argparse.Namespace) -> None:
    """Quantize in one process and in several, with the model's own text and without; compare what was made.

    Without perplexity, which one process measures. The first run of all, which reads the model into the page
    cache, is not counted.
    """
    settings = [f"model={asked.model}", "quantize.perplexity_sequences=0"]
    settings += ["quantize.calibration_length=512"]
    settings += [f"quantize.calibration_sequences={asked.sequences}"]
    make_base(folder, settings)
    quantize(folder, *settings, "quantize=rtn")
    runs, made = {}, {}
    for n in (1, asked.processes):
        both = [*settings, f"quantize.processes={n}"]
        runs[n] = {
            "without_own_text": quantize(folder, *both, "quantize.self_text_share=0"),
            "stage": quantize(folder, *both),
        }
        made[n] = packed_integers(folder / "models/quantized")
    one, several = runs[1], runs[asked.processes]
    for kind in one:
        several[kind]["times_the_speed_of_one"] = round(
            one[kind]["seconds"] / several[kind]["seconds"], 3
        )
    several |= differences(made[1], made[asked.processes])
    name = f"{asked.model}, quantize, {asked.sequences} x 512 tokens"
    keep_also(name, {f"{n} processes": run for n, run in runs.items()})


def quantize(folder: Path, *settings: str) -> dict[str, Any]:
    """Quantize; return what the stage cost."""
    write_params(folder, *settings)
    return run_stage("quantize", folder)


def packed_integers(folder: Path) -> dict[str, torch.Tensor]:
    """Return the packed integers of a checkpoint by name."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".qweight")}


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, int]:
    """Count the layers' 4-bit integers, two a byte, and those of them that differ."""
    names = [name for name in one if name.startswith("model.layers.")]
    assert one.keys() == other.keys()
    differ = [one[name] ^ other[name] for name in names]
    return {
        "integers": sum(2 * each.numel() for each in differ),
        "integers_that_differ": sum(
            int((each & 15).count_nonzero() + (each >> 4).count_nonzero()) for each in differ
        ),
    }


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
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "long.jsonl", asked.tokens)
    make_base(folder, settings)
    run_stage("quantize", folder)


def make_base(folder: Path, settings: list[str]) -> None:
    """Make a model of random weights and prepare rows; what a folder holds already stays."""
    if (folder / "models/base").exists():
        return
    (folder / "data").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "data/travel.jsonl", folder / "data")
    shutil.copy(ROOT / "data/heldout.txt", folder / "data")
    write_params(folder, *settings)
    for stage in ("fetch", "prepare"):
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
