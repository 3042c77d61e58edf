"""Perplexity, exp of the mean negative log likelihood per token, of a model before and after rounding."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from olive.common.quant.utils import WeightQuantizer
from torch import nn
from torch.nn.functional import cross_entropy

from stages.core import live
from stages.core.settings import Quantize
from stages.quantization.architecture import bits_by_module
from stages.weights.checkpoint import load_dequantized, load_float


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: torch.Tensor, label: str) -> float:
    """Return the model's perplexity on token sequences, [sequences, length]."""
    device = next(model.parameters()).device
    total = 0.0
    for row in live.steps(tokens, f"perplexity ({label})", "seq"):
        on_device = row.to(device)
        logits = model(on_device[None]).logits[0, :-1].float()
        total += cross_entropy(logits, on_device[1:], reduction="sum").item()
    return math.exp(total / tokens[:, 1:].numel())


def perplexities(
    base: Path, quantized: Path, texts: dict[str, torch.Tensor], options: Quantize
) -> dict[str, float]:
    """Return the perplexity on each text of the float model, of plain rounding, and of what was made."""

    def all_of(model: nn.Module, label: str) -> dict[str, float]:
        named = {f"{name}_{label}": text for name, text in texts.items()}
        return {name: perplexity(model, text, name) for name, text in named.items()}

    model = load_float(base)
    found = all_of(model, "float")
    round_to_nearest(model, options)
    found |= all_of(model, "rtn")
    del model
    found |= all_of(load_dequantized(quantized), "quantized")
    lost, left = (
        found[f"perplexity_{m}"] - found["perplexity_float"] for m in ("rtn", "quantized")
    )
    found["rtn_loss_recovered"] = 1 - left / lost if lost else 0.0
    return {name: round(value, 3) for name, value in found.items()}


@torch.no_grad()
def round_to_nearest(model: nn.Module, options: Quantize) -> None:
    """Round in place what a pass would quantize, as Olive's `Rtn` does."""
    special = bits_by_module(options, model.config)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # untied
    for name, module in model.named_modules():
        bits = special.get(name, options.bits)
        if isinstance(module, nn.Linear | nn.Embedding) and bits < 16:
            quantizer = WeightQuantizer(bits, options.symmetric, options.group_size)
            module.weight.copy_(quantizer.fake_quantize(module.weight))
