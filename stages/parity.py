"""Parity: does the ONNX model with its adapter answer as PyTorch with PEFT does?

PyTorch reads each ONNX answer once, all tokens in one forward pass. Where its own greedy choice is
the next token all the way, its greedy answer would have been the same. The first place where it is
not is the first divergence, explained when PyTorch saw the two tokens as a near-tie: closer to each
other than what the export's arithmetic (int8 activations) does to such gaps on a long prompt, and than
evaluate.largest_tie, so that a broken export does not widen its own margin.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from stages.checkpoint import load_dequantized
from stages.places import place
from stages.settings import Evaluate

QUANTIZED = Path("models/quantized")
PEFT_ADAPTER = place("models/adapter")


@torch.no_grad()
def compare(
    predictions: list[dict], long_prompt: list[int], onnx_logits: np.ndarray, options: Evaluate
) -> dict[str, Any]:
    """Add a `parity` verdict to every prediction; return the shares, the noise and the perplexity.

    `onnx_logits`, [tokens, vocabulary], are those of the long prompt; two tokens count as tied when
    their gap is within the quantile evaluate.near_tie of the noise, and evaluate.largest_tie.
    """
    model = PeftModel.from_pretrained(load_dequantized(QUANTIZED), PEFT_ADAPTER).eval()
    tokens = torch.tensor(long_prompt, device=model.device)
    logits = model(tokens[None], use_cache=False).logits[0].float()
    noise = gap_noise(logits.cpu(), torch.from_numpy(onnx_logits), options.near_tie)
    near_tie = min(noise, options.largest_tie)
    for prediction in tqdm(predictions, desc="parity"):
        answer = prediction["adapter"]["tokens"]
        prediction["parity"] = first_divergence(model, prediction["prompt"], answer, near_tie)
    verdicts = [prediction["parity"]["verdict"] for prediction in predictions]
    return {
        "identical_answers": round(verdicts.count("identical") / len(verdicts), 4),
        "explained_answers": round(1 - verdicts.count("different") / len(verdicts), 4),
        "logit_gap_noise": round(noise, 3),
        "long_prompt_perplexity_torch": perplexity_of(logits, tokens),
    }


def gap_noise(ours: torch.Tensor, theirs: torch.Tensor, quantile: float) -> float:
    """Return by how much the gap between our two best tokens differs, [tokens, vocabulary] both."""
    best = ours.topk(2, dim=-1).indices
    differences = (ours - theirs).gather(-1, best).diff(dim=-1).abs()
    return differences.flatten().quantile(quantile).item()


def first_divergence(
    model, prompt: list[int], answer: list[int], near_tie: float
) -> dict[str, Any]:
    """Return the verdict on one answer: identical, near-tie or different, and where and by how much."""
    tokens = torch.tensor([prompt + answer], device=model.device)
    logits = model(tokens, logits_to_keep=len(answer) + 1, use_cache=False).logits[0, :-1].float()
    chosen = tokens[0, len(prompt) :]
    differs = (logits.argmax(-1) != chosen).nonzero()
    if not len(differs):
        return {"verdict": "identical"}
    step = int(differs[0])
    gap = round((logits[step].max() - logits[step, chosen[step]]).item(), 3)
    verdict = "near-tie" if gap <= near_tie else "different"
    return {"verdict": verdict, "token": step, "logit_gap": gap}


def perplexity_of(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Return the perplexity of tokens under the logits before each of them."""
    return round(math.exp(cross_entropy(logits[:-1], tokens[1:]).item()), 3)
