"""Does every family's export answer as PyTorch does? The table of docs/models.md.

    python -m benchmarks.architectures      # three minutes; writes benchmarks/results/architectures.json

Tiny checkpoints with random weights, packed to 4 bits: for each export (cpu_exact, cpu_int4), without an
adapter and with one, the largest difference of logits on 200 tokens, and how many of 20 greedy answers of 16
tokens are identical. PyTorch with PEFT runs on the dequantized weights.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import ROOT, keep
from stages.adapters.convert import convert
from stages.answers.generation import OnnxModel
from stages.core.running import quietly
from stages.core.settings import Optimize
from stages.weights.checkpoint import load_dequantized

sys.path.insert(0, str(ROOT / "tests"))
from support.tiny_models import FAMILIES, checkpoint, exported, greedy, logits, tokens, trained

LEVELS = {"cpu_exact": 1, "cpu_int4": 4}
PROMPTS, ANSWER, LONG = 20, 16, 200
ADAPTER = "one"


def main() -> None:
    """Measure every family, keep the figures, print the table."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    figures = {family: measure(family) for family in FAMILIES}
    keep("architectures", figures)
    print(f"| family | {' | '.join(f'{export}: logits, answers' for export in LEVELS)} |")
    print("|" + "---|" * (1 + len(LEVELS)))
    for family, exports in figures.items():
        print(f"| {family} | {' | '.join(map(cell, exports.values()))} |")


def cell(found: dict[str, Any]) -> str:
    """Say an export's largest differences of logits and its identical answers, each also with an adapter."""
    logits = f"{found['logits']:.1e}, {found['logits_adapter']:.1e}"
    return f"{logits}; {found['answers']}, {found['answers_adapter']} of {PROMPTS}"


def measure(family: str) -> dict[str, Any]:
    """Export one family in every way, and compare each with PyTorch."""
    with tempfile.TemporaryDirectory() as scratch, quietly():
        root = Path(scratch)
        packed = checkpoint(root, FAMILIES[family])
        plain, adapted = load_dequantized(packed), trained(packed, root / "peft", 1)
        found = {}
        for name, level in LEVELS.items():
            options = Optimize(execution_provider="cpu", accuracy_level=level)
            folder = exported(packed, root / name, options=options)
            convert(root / "peft", folder, root / f"{name}.onnx_adapter")
            onnx = OnnxModel(folder, {ADAPTER: root / f"{name}.onnx_adapter"})
            base, tuned = compare(onnx, None, plain), compare(onnx, ADAPTER, adapted)
            found[name] = base | {f"{key}_adapter": value for key, value in tuned.items()}
        return found


def compare(onnx: OnnxModel, adapter: str | None, model: torch.nn.Module) -> dict[str, Any]:
    """Return the largest difference of logits, and how many greedy answers are identical."""
    text = tokens(LONG)
    difference = np.abs(onnx.logits(text, adapter) - logits(model, text)).max()
    prompts = [tokens(8 + number) for number in range(PROMPTS)]
    same = sum(
        onnx.generate(p, ANSWER, adapter) == greedy(model, p, ANSWER, onnx.ends) for p in prompts
    )
    return {"logits": float(f"{difference:.3g}"), "answers": same}


if __name__ == "__main__":
    main()
