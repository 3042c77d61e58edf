"""Chats as tokens: the prepared rows, the model's chat template, and fixed-length sequences of them.

    tokens, labels = training_tokens(tokenizer, row)

One place says what a row's tokens are, for calibration, training and evaluation alike. Answers are encoded
apart from what stands before them, as at inference, where the prompt's tokens are already fixed. What
people typed never becomes a control token: "<|im_end|>" in a question is ten characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages.errors import UserError

Row = dict[str, Any]
Messages = list[dict[str, str]]
NOT_LEARNED = -100  # the label that cross entropy leaves out
PRIVATE_USE = range(0xE000, 0xF900)  # characters without a meaning of their own


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer; no remote code."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def read_rows(path: str | Path) -> list[Row]:
    """Read a JSONL file that `prepare` wrote; a line separator of Unicode may stand inside a text."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def question_of(row: Row) -> str:
    """Return the text of the last user turn."""
    return next(turn["content"] for turn in reversed(row["messages"]) if turn["role"] == "user")


def reference_of(row: Row) -> str:
    """Return the text of the last turn, the assistant's reference answer."""
    return row["messages"][-1]["content"]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Return the tokens of all turns before the reference answer, up to where it begins."""
    return [token for tokens, _ in prompt_pieces(tokenizer, row) for token in tokens]


def answer_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Return the tokens of the reference answer, with the one token that ends it."""
    return [*encode_typed(tokenizer, reference_of(row).strip()), end_id(tokenizer)]


def training_tokens(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[int]]:
    """Return a row's tokens and labels: every answer and the one token that ends it are learned."""
    tokens: list[int] = []
    labels: list[int] = []
    end, after_answer = end_id(tokenizer), False
    for piece, is_answer in prompt_pieces(tokenizer, row):
        tokens += piece
        labels += piece if is_answer else [NOT_LEARNED] * len(piece)
        ending = first_control(tokenizer, piece) if after_answer else None
        if ending is not None and piece[ending] == end:
            labels[len(labels) - len(piece) + ending] = end
        after_answer = is_answer
    answer = answer_ids(tokenizer, row)
    return tokens + answer, labels + answer


def prompt_pieces(tokenizer: PreTrainedTokenizerBase, row: Row) -> Iterator[tuple[list[int], bool]]:
    """Yield the prompt's tokens piece by piece, and whether a piece is an earlier answer.

    Answers and control tokens that people typed pass through the template as single characters that no
    message holds, so that the template's own control tokens are the only ones in the rendered text.
    """
    messages = [stripped(turn) for turn in row["messages"][:-1]]
    names = unused_characters(messages)
    typed = {text: next(names) for text in control_tokens(tokenizer)}
    open_, close = next(names), next(names)
    text = render(tokenizer, row, [disguised(turn, typed, open_, close) for turn in messages])
    for number, part in enumerate(re.split(f"{open_}(.*?){close}", text, flags=re.DOTALL)):
        if part:
            yield encode(tokenizer, part, typed), number % 2 == 1


def stripped(turn: dict[str, str]) -> dict[str, str]:
    """Return an answer without outer white space, which nobody wants to be learned."""
    return turn | {"content": turn["content"].strip()} if turn["role"] == "assistant" else turn


def unused_characters(messages: Messages) -> Iterator[str]:
    """Yield characters that stand in no message."""
    used = set().union(*(turn["content"] for turn in messages))
    return (chr(code) for code in PRIVATE_USE if chr(code) not in used)


def disguised(
    turn: dict[str, str], typed: dict[str, str], open_: str, close: str
) -> dict[str, str]:
    """Return a turn with its control tokens replaced, and an answer marked as one."""
    content = turn["content"]
    for control, name in typed.items():
        content = content.replace(control, name)
    return turn | {
        "content": f"{open_}{content}{close}" if turn["role"] == "assistant" else content
    }


def encode(tokenizer: PreTrainedTokenizerBase, text: str, typed: dict[str, str]) -> list[int]:
    """Return the tokens of rendered text; what was replaced is encoded as the plain text it was."""
    plain = {name: control for control, name in typed.items()}
    tokens: list[int] = []
    for part in filter(None, re.split(f"([{''.join(plain)}])" if plain else "(?!)", text)):
        if part in plain:
            tokens += encode_typed(tokenizer, plain[part])
        else:
            tokens += tokenizer(part, add_special_tokens=False).input_ids
    return tokens


def encode_typed(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of what somebody wrote, none of them a control token."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts that the tokenizer reads as control tokens, longest first."""
    tokens = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    return sorted(tokens, key=lambda token: (-len(token), token))


def render(
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    messages: Messages,
    add_generation_prompt: bool = True,
) -> str:
    """Return messages in the model's chat template. Raises `UserError` where it refuses them."""
    if not tokenizer.chat_template:
        raise UserError("the model has no chat template: choose an instruct model in conf/model")
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        where, reason = row.get("source", "a chat"), " ".join(str(error).split())
        raise UserError(f"{where}: the model's chat template refuses it: {reason}") from None


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends an answer: the control token that the template puts behind one.

    That is not always the tokenizer's end-of-text token: Phi-3 ends a turn with <|end|>.
    """
    answer = chr(PRIVATE_USE[0])
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    behind = render(tokenizer, {}, turns, add_generation_prompt=False).rpartition(answer)[2]
    tokens = tokenizer(behind, add_special_tokens=False).input_ids
    position = first_control(tokenizer, tokens)
    end = tokenizer.eos_token_id if position is None else tokens[position]
    if end is None:
        raise UserError("the model's tokenizer has no token that ends an answer (eos_token)")
    return end


def first_control(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> int | None:
    """Return where the first control token stands, None where there is none."""
    control = {number for number, t in tokenizer.added_tokens_decoder.items() if t.special}
    return next((place for place, token in enumerate(tokens) if token in control), None)


def sequences(
    tokenizer: PreTrainedTokenizerBase, rows: list[Row], count: int, length: int
) -> list[list[int]]:
    """Pack whole chats end to end into at most `count` rows of `length` tokens."""
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
    return [stream[number * length : (number + 1) * length] for number in range(count)]
