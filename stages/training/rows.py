"""The rows that are trained on: cut to length, those cut and left out named, in the order of all steps.

train, validation = load_rows(tokenizer, Path("data/prepared"), settings.finetune)
train = order_rows(train, settings.finetune)
"""

from __future__ import annotations

import random
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from stages.core.errors import UserError
from stages.core.settings import Finetune
from stages.text.chat_encoder import NOT_LEARNED
from stages.text.chats import check_rows, training_tokens, writes_the_date
from stages.text.conversation import Conversation, read_conversations
from stages.training import together

NAMED = 20  # rows that a warning names; the others are counted


def load_rows(
    tokenizer: PreTrainedTokenizerBase, prepared: Path, options: Finetune
) -> tuple[Dataset, Dataset]:
    """Return the tokens and labels of training rows and of a sample of validation rows.

    Raises `UserError` that names the rows of which the chat template makes something else.
    """
    # test is checked too, so that evaluate does not fail after the training
    names = ("train", "validation", "test")
    train, validation, test = (read_conversations(prepared / f"{name}.jsonl") for name in names)
    changed = check_rows(tokenizer, [*train, *validation, *test])
    warn("rows with an answer that the chat template shows changed, cut or not at all", changed)
    if writes_the_date(tokenizer) and together.rank() == 0:
        print("finetune: the chat template writes today's date: 26 July 2024 in every row and chat")
    validation = validation[:: max(1, len(validation) // options.validation_rows)]
    return (
        truncate_rows(tokenizer, train, "train", options),
        truncate_rows(tokenizer, validation, "validation", options),
    )


def truncate_rows(
    tokenizer: PreTrainedTokenizerBase, rows: list[Conversation], name: str, options: Finetune
) -> Dataset:
    """Return rows cut to finetune.max_length; those that keep no answer are left out, and named.

    A cut answer is trained on as far as it goes: nothing teaches the model to end there.
    Raises `UserError` where no row keeps an answer.
    """
    kept, cut, left_out = [], [], []
    for row in rows:
        tokens, labels = training_tokens(tokenizer, row)
        short = {"input_ids": tokens[: options.max_length], "labels": labels[: options.max_length]}
        if all(label == NOT_LEARNED for label in short["labels"][1:]):
            left_out.append(row.source)
            continue
        kept.append(short)
        if len(tokens) > options.max_length:
            cut.append(row.source)
    limit = f"finetune.max_length is {options.max_length}"
    if not kept:
        raise UserError(
            f"{limit}: no row of {name} keeps a token of its answer "
            f"({named(left_out)}): raise it, or bring shorter prompts"
        )
    warn(f"{limit}: {name} rows that keep no answer and are left out", left_out)
    warn(f"{limit}: {name} rows whose answer loses its end", cut)
    return Dataset.from_list(kept)


def warn(what: str, sources: list[str]) -> None:
    """Print how many rows something happened to, and which."""
    if sources and together.rank() == 0:
        print(f"finetune: {what}: {len(sources)} ({named(sources)})", flush=True)


def named(sources: list[str]) -> str:
    """Return the first of the rows' file:line, and dots for the others."""
    return ", ".join([*sources[:NAMED], *(["..."] if len(sources) > NAMED else [])])


def order_rows(rows: Dataset, options: Finetune) -> Dataset:
    """Return the rows of all steps in their order: shuffled again for every pass over them.

    Read from first to last, they need no random state that a resumed run would have to restore.
    """
    shuffle = random.Random(options.seed)
    order: list[int] = []
    while len(order) < options.max_steps * options.batch_size:
        order += shuffle.sample(range(len(rows)), len(rows))
    return rows.select(order[: options.max_steps * options.batch_size])
