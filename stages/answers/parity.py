"""Parity: does the ONNX model with its adapter answer as PyTorch with PEFT does?

PyTorch reads each ONNX answer once, all tokens in one forward pass. Where its own greedy choice is the next
token all the way, its greedy answer would have been the same. Else the first token where it is not is the
first divergence, and the gap is by how much PyTorch preferred its own: near 0 means that both were tied.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from stages.weights.checkpoint import load_dequantized


@torch.no_grad()
def compare(
    checkpoint: Path,
    adapter: Path,
    predictions: list[dict],
    long_prompt: list[int],
    batch_size: int,
    rope_switch: int | None = None,
) -> dict[str, Any]:
    """Let PyTorch read every prediction, on a checkpoint with a PEFT adapter.

    Adds a `parity` verdict to every prediction; returns the share of identical answers, the widest gap
    (in logits) at a first divergence, and PyTorch's perplexity on the long prompt."""
    model = PeftModel.from_pretrained(load_dequantized(checkpoint), adapter).eval()
    by_length = sorted(predictions, key=lambda p: len(p["prompt"]) + len(p["adapter"]["tokens"]))
    for first in tqdm(range(0, len(by_length), batch_size), desc="parity", unit="batch"):
        batch = by_length[first : first + batch_size]
        for prediction, logits in zip(batch, answer_logits(model, batch, rope_switch), strict=True):
            prediction["parity"] = first_divergence(logits, prediction["adapter"]["tokens"])
    verdicts = [prediction["parity"] for prediction in predictions]
    return {
        "identical_answers": round(sum(v["identical"] for v in verdicts) / len(verdicts), 4),
        "widest_divergence": max((v.get("logit_gap", 0.0) for v in verdicts), default=0.0),
        "long_prompt_perplexity_torch": perplexity(model, long_prompt),
    }


def answer_logits(model, batch: list[dict], rope_switch: int | None = None) -> list[torch.Tensor]:
    """Return PyTorch's logits before every token of each answer, [answer, vocabulary] each.

    Shorter rows are padded behind their end, which a causal model never looks at.
    """
    rows = [torch.tensor(p["prompt"] + p["adapter"]["tokens"]) for p in batch]
    if rope_switch is not None and max(map(len, rows)) > rope_switch:
        starts = [len(p["prompt"]) - 1 for p in batch]
        logits = (logits_as_written(model, row.to(model.device), rope_switch) for row in rows)
        return [read[first:-1] for read, first in zip(logits, starts, strict=True)]
    padded = pad_sequence(rows, batch_first=True).to(model.device)
    first = min(len(p["prompt"]) for p in batch) - 1
    kept = padded.shape[1] - first
    logits = model(padded, logits_to_keep=kept, use_cache=False).logits.float()
    return [
        row_logits[len(p["prompt"]) - 1 - first : len(row) - 1 - first]
        for row_logits, row, p in zip(logits, rows, batch, strict=True)
    ]


def logits_as_written(model, row: torch.Tensor, rope_switch: int) -> torch.Tensor:
    """Return a longrope model's logits, [tokens, vocabulary], as it has them while it writes the row.

    Up to the switch, in tokens, a text is turned by the short factors; one longer than that, all of it, by
    the long ones.
    """
    near = model(row[None, :rope_switch], use_cache=False).logits[0].float()
    if len(row) <= rope_switch:
        return near
    far = model(row[None], use_cache=False).logits[0].float()
    return torch.cat((near, far[rope_switch:]))


def first_divergence(logits: torch.Tensor, answer: list[int]) -> dict[str, Any]:
    """Return whether PyTorch gives the same answer; where not, at which token and by what logit gap."""
    chosen = torch.tensor(answer, device=logits.device)
    differs = (logits.argmax(-1) != chosen).nonzero()
    if not len(differs):
        return {"identical": True}
    step = int(differs[0])
    gap = (logits[step].max() - logits[step, chosen[step]]).item()
    return {"identical": False, "token": step, "logit_gap": round(gap, 4)}


def perplexity(model, tokens: list[int]) -> float:
    """Return PyTorch's perplexity on a text."""
    row = torch.tensor(tokens, device=model.device)
    logits = model(row[None], use_cache=False).logits[0].float()
    return round(math.exp(cross_entropy(logits[:-1], row[1:]).item()), 3)
