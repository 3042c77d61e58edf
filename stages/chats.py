"""Chats as tokens: the prepared rows, the model's chat template, and fixed-length sequences of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stages.errors import UserError

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """Read a JSONL file that `prepare` wrote; a line separator of Unicode may stand inside a text."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def prompt_text(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    """Return the prompt in the model's chat template, up to where the answer begins."""
    return tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Return the tokens of the prompt, up to where the answer begins."""
    return tokenizer(prompt_text(tokenizer, row), add_special_tokens=False).input_ids


def answer_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Return the tokens of the reference answer, with the token that ends it."""
    chat = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    answer = chat[len(prompt_text(tokenizer, row)) :].rstrip()
    return tokenizer(answer, add_special_tokens=False).input_ids


def sequences(
    tokenizer: PreTrainedTokenizerBase, rows: list[Row], count: int, length: int
) -> torch.Tensor:
    """Pack whole chats end to end into at most `count` rows of `length` tokens, [sequences, length]."""
    stream: list[int] = []
    for row in rows:
        stream += prompt_ids(tokenizer, row) + answer_ids(tokenizer, row)
        if len(stream) >= count * length:
            break
    count = min(count, len(stream) // length)
    if count == 0:
        raise UserError(
            f"{len(stream)} tokens of data do not fill one sequence of {length}: "
            "lower quantize.calibration_length or bring more data"
        )
    return torch.tensor(stream[: count * length]).view(count, length)
