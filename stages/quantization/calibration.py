"""The texts of quantization: what calibrates it, and what it is measured on.

tokens = calibration_set(base, rows, settings.quantize)      # rows of data/prepared/calibration.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from stages.core import live
from stages.core.settings import Quantize
from stages.quantization.shares import combined, is_mine
from stages.text.chats import check_rows, load_tokenizer, sequences
from stages.text.conversation import Conversation
from stages.weights.checkpoint import load_float
from stages.weights.hardware import fast_dtype

PIECES = 64  # more fill a GPU's memory with keys and values


def calibration_set(base: Path, rows: list[Conversation], options: Quantize) -> torch.Tensor:
    """Return the calibration set, [sequences, length]: task text, and text that the model itself writes."""
    tokenizer, length = load_tokenizer(base), options.calibration_length
    check_rows(tokenizer, rows)  # all of them: finetune trains on what calibration skips
    own = round(options.calibration_sequences * options.self_text_share)
    task = options.calibration_sequences - own
    parts = [torch.tensor(sequences(tokenizer, rows, task, length))] if task else []
    return torch.cat([*parts, self_text(base, own, length, options.seed)] if own else parts)


@torch.no_grad()
def self_text(base: Path, count: int, length: int, seed: int) -> torch.Tensor:
    """Return text sampled from the float model at temperature 1, [count, length].

    A sequence is two pieces that each begin with a token drawn at random, so that no two are alike
    (LLM-QAT, arXiv:2305.17888), and PIECES are written at once. An embedding may have more rows than the
    tokenizer has tokens; those are never drawn.
    """
    model = load_float(base, fast_dtype())
    rows = set(range(model.config.vocab_size))
    known = rows & set(load_tokenizer(base).get_vocab().values())
    tokens, nobodys = torch.tensor(sorted(known)), sorted(rows - known)
    set_seed(seed)
    first = tokens[torch.randint(len(tokens), (2 * count, 1))].to(model.device)
    words: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": 0,
    }
    words |= {"suppress_tokens": nobodys} if nobodys else {}
    words |= dict.fromkeys(("min_new_tokens", "max_new_tokens"), length // 2 - 1)
    written = torch.zeros(2 * count, length // 2, dtype=torch.int64)
    parts = first.split(PIECES)
    for number, part in enumerate(live.steps(parts, "the model's own text", "batch")):
        if is_mine(number):
            text = model.generate(part, attention_mask=torch.ones_like(part), **words)
            written.split(PIECES)[number].copy_(text)
        else:
            skip_draws(len(part), length // 2 - 1, model)
    return combined(written).reshape(count, -1)


def skip_draws(pieces: int, tokens: int, model: torch.nn.Module) -> None:
    """Make the draws that writing these pieces takes, which another process writes.

    So every batch finds the generator as it would be if one process wrote all of them.
    """
    even = torch.ones(pieces, model.config.vocab_size, device=model.device)
    for _ in range(tokens):
        torch.multinomial(even, 1)


def task_text(base: Path, rows: list[Conversation], options: Quantize) -> torch.Tensor:
    """Return validation rows, which calibration never saw, [sequences, length]: unseen groups, if any."""
    unseen = [row for row in rows if row.kind == "transfer"] or rows
    count = max(1, options.perplexity_sequences // 3)
    packed = sequences(load_tokenizer(base), unseen, count, options.perplexity_length)
    return torch.tensor(packed)


def heldout_prose(base: Path, file: Path, options: Quantize) -> torch.Tensor:
    """Return prose from elsewhere (data/README.md), [sequences, length]."""
    tokens = load_tokenizer(base)(file.read_text(encoding="utf-8")).input_ids
    count = min(options.perplexity_sequences, len(tokens) // options.perplexity_length)
    return torch.tensor(tokens[: count * options.perplexity_length]).view(count, -1)
