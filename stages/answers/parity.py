"""Parity: whether the ONNX model with its adapter answers as PyTorch with PEFT does.

PyTorch reads each ONNX answer once, all tokens in one forward pass. Where its own greedy choice is the next
token all the way, its greedy answer would have been the same. Else the first token where it is not is the
first divergence, and the gap is by how much PyTorch preferred its own: near 0 means that both were tied.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from stages.answers.limits import Limits
from stages.core import live
from stages.scoring.predictions import Parity
from stages.weights.checkpoint import load_dequantized

Text = tuple[list[int], list[int]]  # a prompt's tokens and those of the ONNX model's answer


def load(checkpoint: Path, adapter: Path) -> PeftModel:
    """Return PyTorch's model: the weights of a packed checkpoint, with a PEFT adapter."""
    return PeftModel.from_pretrained(load_dequantized(checkpoint), adapter).eval()


@torch.no_grad()
def compare(model: PeftModel, texts: list[Text], batch_size: int, limits: Limits) -> list[Parity]:
    """Return, for every answer, whether PyTorch would have given it, in the order of `texts`."""
    by_length = sorted(range(len(texts)), key=lambda n: len(texts[n][0]) + len(texts[n][1]))
    verdicts: dict[int, Parity] = {}
    for first in live.steps(range(0, len(by_length), batch_size), "parity", "batch"):
        batch = by_length[first : first + batch_size]
        read = answer_logits(model, [texts[number] for number in batch], limits)
        for number, logits in zip(batch, read, strict=True):
            verdicts[number] = first_divergence(logits, texts[number][1])
    return [verdicts[number] for number in range(len(texts))]


def summarize(verdicts: list[Parity]) -> dict[str, float]:
    """Return the share of identical answers, and the widest gap, in logits, at a first divergence."""
    gaps = [verdict.logit_gap for verdict in verdicts if verdict.logit_gap is not None]
    return {
        "identical_answers": round(sum(v.identical for v in verdicts) / len(verdicts), 4),
        "widest_divergence": max(gaps, default=0.0),
    }


def answer_logits(model: torch.nn.Module, texts: list[Text], limits: Limits) -> list[torch.Tensor]:
    """Return PyTorch's logits before every token of each answer, [answer, vocabulary] each.

    Shorter rows are padded behind their end, which a causal model never looks at.
    """
    rows = [torch.tensor(prompt + answer) for prompt, answer in texts]
    if not limits.reach(max(map(len, rows))):
        logits = (logits_as_written(model, row.to(model.device), limits) for row in rows)
        return [read[len(prompt) - 1 : -1] for read, (prompt, _) in zip(logits, texts, strict=True)]
    padded = pad_sequence(rows, batch_first=True).to(model.device)
    # the shortest prompt's last token predicts the first answer token: no logits before it are needed
    first = min(len(prompt) for prompt, _ in texts) - 1
    kept = padded.shape[1] - first
    logits = model(padded, logits_to_keep=kept, use_cache=False).logits.float()
    return [
        row_logits[len(prompt) - 1 - first : len(row) - 1 - first]
        for row_logits, row, (prompt, _) in zip(logits, rows, texts, strict=True)
    ]


def logits_as_written(model: torch.nn.Module, row: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Return a longrope model's logits, [tokens, vocabulary], as it has them while it writes the row.

    Up to the switch, in tokens, a text is turned by the short factors; one longer than that, all of it, by
    the long ones.
    """
    switch = limits.rope_switch
    near = model(row[None, :switch], use_cache=False).logits[0].float()
    if limits.reach(len(row)):
        return near
    far = model(row[None], use_cache=False).logits[0].float()
    return torch.cat((near, far[switch:]))


def first_divergence(logits: torch.Tensor, answer: list[int]) -> Parity:
    """Return whether PyTorch gives the same answer; where not, at which token and by what logit gap."""
    chosen = torch.tensor(answer, device=logits.device)
    differs = (logits.argmax(-1) != chosen).nonzero()
    if not len(differs):
        return Parity(identical=True)
    step = int(differs[0])
    gap = (logits[step].max() - logits[step, chosen[step]]).item()
    return Parity(identical=False, token=step, logit_gap=round(gap, 4))


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: list[int]) -> float:
    """Return PyTorch's perplexity on a text."""
    row = torch.tensor(tokens, device=model.device)
    logits = model(row[None], use_cache=False).logits[0].float()
    return round(math.exp(cross_entropy(logits[:-1], row[1:]).item()), 3)
