"""Perplexity: exp of the mean negative log likelihood per token."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: torch.Tensor, label: str) -> float:
    """Return the model's perplexity on token sequences, [sequences, length]."""
    device = next(model.parameters()).device
    total = 0.0
    for row in tqdm(tokens, desc=f"perplexity ({label})", unit="seq"):
        row = row.to(device)
        logits = model(row[None]).logits[0, :-1].float()
        total += cross_entropy(logits, row[1:], reduction="sum").item()
    return math.exp(total / tokens[:, 1:].numel())
