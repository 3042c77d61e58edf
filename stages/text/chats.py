"""Chats as tokens: the prepared rows, the model's chat template, and fixed-length sequences of them.

    tokens, labels = training_tokens(tokenizer, row)

One place says what a row's tokens are, for calibration, training, evaluation and chat alike: those that the
chat template's own text has. The prompt is the template's generation prompt, as at inference; the answer is
what the template writes behind it, up to the one token that ends it. `check_rows` names the rows of which the
template makes something else.

`chat_encoder` has the work, for one tokenizer. transformers is imported only to load one, so that `lab chat`
starts at once.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from stages.core.errors import UserError
from stages.text.chat_encoder import (
    ChatEncoder,
    said_by,
)
from stages.text.conversation import Conversation, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 20  # bad rows that are listed; the others are counted


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer; no remote code."""
    from transformers import AutoTokenizer  # takes seconds, and `lab chat` needs none of it

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, row: Conversation) -> list[int]:
    """Return the tokens of all turns before the reference answer, up to where it begins."""
    return encoder_of(tokenizer).prompt(row)


def generation_prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[Turn]) -> list[int]:
    """Return the tokens of a chat that ends with a user turn, up to where the answer begins."""
    return prompt_ids(tokenizer, Conversation([*messages, said_by("assistant", "")]))


def answer_ids(tokenizer: PreTrainedTokenizerBase, row: Conversation) -> list[int]:
    """Return the tokens of the reference answer, with the one token that ends it."""
    return encoder_of(tokenizer).chat(row).answer


def training_tokens(
    tokenizer: PreTrainedTokenizerBase, row: Conversation
) -> tuple[list[int], list[int]]:
    """Return a row's tokens and labels: every answer and the one token that ends it are learned."""
    chat = encoder_of(tokenizer).chat(row)
    return chat.prompt + chat.answer, chat.prompt_labels + chat.answer


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends an answer: the control token that the template puts behind one."""
    return encoder_of(tokenizer).end


def writes_the_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the chat template writes today's date; every row and every chat gets the same one."""
    return encoder_of(tokenizer).template is not None


def check_rows(tokenizer: PreTrainedTokenizerBase, rows: list[Conversation]) -> list[str]:
    """Return the sources of rows of which the template shows something changed, cut or not at all.

    It is learned as far as the template shows it. Raises one `UserError` that names every row of which no
    training row can be made, or whose tools or last reasoning the template leaves out.
    """
    encoder = encoder_of(tokenizer)
    bad: list[str] = []
    changed: list[str] = []
    for row in rows:
        try:
            if encoder.leaves_out(row) or encoder.chat(row).changed:
                changed.append(row.source)
        except UserError as error:
            bad.append(str(error))
    if len(bad) > 1:
        more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        head = f"{len(bad)} of {len(rows)} rows do not fit the model's chat template"
        raise UserError("\n".join([head, *bad[:SHOWN], *more]))
    if bad:
        raise UserError(bad[0])
    return changed


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """Return the tokenizer's encoder, made once per chat template."""
    if not tokenizer.chat_template:
        raise UserError("the model has no chat template: choose an instruct model in conf/model")
    return _encoder(tokenizer, repr(tokenizer.chat_template))


@lru_cache(maxsize=4)
def _encoder(tokenizer: PreTrainedTokenizerBase, _template: str) -> ChatEncoder:
    return ChatEncoder(tokenizer)


def sequences(
    tokenizer: PreTrainedTokenizerBase, rows: list[Conversation], count: int, length: int
) -> list[list[int]]:
    """Pack whole chats end to end into at most `count` rows of `length` tokens."""
    stream: list[int] = []
    for row in rows:
        stream += training_tokens(tokenizer, row)[0]
        if len(stream) >= count * length:
            break
    count = min(count, len(stream) // length)
    if count == 0:
        raise UserError(
            f"{len(stream)} tokens of data do not fill one sequence of {length}: "
            "lower quantize.calibration_length or bring more data"
        )
    return [stream[number * length : (number + 1) * length] for number in range(count)]
