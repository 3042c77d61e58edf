"""The same weights on the devices of this machine: how far from cpu_exact, and how fast.

    python -m benchmarks.devices cpu_exact cpu_int4      # options of conf/optimize; after dvc repro
    python -m benchmarks.devices webgpu_int4 --prompt 8 --answer 4     # in software: a minute a token

Writes benchmarks/results/devices.json, a row for each option, with the machine that it was measured on; rows
of other machines stay. Each is exported anew from models/quantized, and converts models/adapter.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import RESULTS, describe
from stages.adapters.convert import convert
from stages.answers.devices import in_software
from stages.answers.generation import OnnxModel
from stages.core.files import read_json, write_json
from stages.core.running import be_quiet, quietly
from stages.core.settings import Optimize
from stages.graph.export import export
from stages.params import compose, values_of

QUANTIZED, PEFT = Path("models/quantized"), Path("models/adapter")
KEPT = RESULTS / "devices.json"
EXACT = "cpu_exact"


def main() -> None:
    """Measure every option that is named, and keep its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("options", nargs="+", help="files of conf/optimize, without .yaml")
    parser.add_argument("--prompt", type=int, default=64, help="tokens that are read")
    parser.add_argument("--answer", type=int, default=32, help="tokens that are written")
    asked = parser.parse_args()
    be_quiet()
    prompt = np.random.default_rng(0).integers(16, 40000, asked.prompt).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        wanted = answers(*exported(EXACT, Path(scratch)), prompt, asked.answer)
        for name in asked.options:
            found = answers(*exported(name, Path(scratch)), prompt, asked.answer)
            row = {"prompt": asked.prompt, "answer": asked.answer, **compared(found, wanted)}
            row["in_software"] = in_software() and name.startswith("webgpu")
            keep_row(name, row)
            print(name, row, flush=True)


def exported(name: str, scratch: Path) -> tuple[Path, Path]:
    """Export by an option of conf/optimize, once; return the folder and the adapter's file."""
    folder, file = scratch / name, scratch / f"{name}.onnx_adapter"
    if not folder.exists():
        options = Optimize.model_validate(values_of(compose([f"optimize={name}"]))["optimize"])
        with quietly():
            export(QUANTIZED, options, "all-linear", folder)
        convert(PEFT, folder, file)
    return folder, file


def answers(folder: Path, file: Path, prompt: list[int], count: int) -> dict[str, Any]:
    """Return logits, tokens and seconds of a model, without the adapter and with it."""
    found = {}
    for name, adapters in (("base", {}), ("adapter", {"adapter": file})):
        model = OnnxModel(folder, adapters)
        used = "adapter" if adapters else None
        logits = model.logits(prompt, used)
        tokens, ticks = [], []
        for token in model.stream(prompt, count, used):
            tokens.append(token)
            ticks.append(time.perf_counter())
        found[name] = {"logits": logits, "tokens": tokens, "seconds": np.diff(ticks)}
    return found


def compared(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return how far a model's logits are off, in standard deviations, and how many tokens are the same."""
    row: dict[str, Any] = {}
    for name, one in found.items():
        exact = wanted[name]
        gaps = (one["logits"] - exact["logits"]).std(axis=1) / exact["logits"].std(axis=1)
        pairs = list(zip(one["tokens"], exact["tokens"], strict=False))
        differs = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        row[name] = {
            "off_sd": float(f"{gaps.max():.2g}"),
            "same_tokens": differs,
            "tokens": len(exact["tokens"]),
            "tokens_per_s": float(f"{1 / np.median(one['seconds']):.3g}"),
        }
    return row


def keep_row(name: str, row: dict[str, Any]) -> None:
    """Write one row, beside those that are there."""
    rows = read_json(KEPT) if KEPT.is_file() else {}
    write_json(KEPT, rows | {name: row | {"machine": describe()}})


if __name__ == "__main__":
    main()
