"""Split the questions and answers into train, validation, test and calibration sets.

    python -m stages.prepare         # conf/data says which file and how

Whole groups (places) are held out to measure transfer; of every other (group, fact) some wordings are
held out to measure recall. A file without those columns is split at random. A written row holds messages,
kind, answer, group, fact and source (file:line), and tools where it has some. No prompt stands in two splits.
"""

from __future__ import annotations

import random
import unicodedata
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from stages.core.errors import UserError
from stages.core.files import written_beside
from stages.core.running import run
from stages.core.settings import Data, Settings
from stages.text.conversation import Conversation, write_conversations
from stages.text.layouts import import_conversations

PREPARED = Path("data/prepared")
COST = Path("metrics/speed/prepare.json")
Splits = dict[str, list[Conversation]]
LOOKS_LIKE = str.maketrans(
    dict.fromkeys("‘’‚‛′´", "'")  # noqa: RUF001
    | dict.fromkeys("“”„‟″«»", '"')
    | dict.fromkeys("‐‑‒–—―−", "-")  # noqa: RUF001
    | dict.fromkeys(map(chr, range(0xFE00, 0xFE10)))  # variation selectors
)


def prepare(settings: Settings) -> str:
    """Read the rows, split them, prove that the splits are disjoint, write them."""
    data = settings.data
    rows = import_conversations(Path(data.path), data)
    if len(rows) < 3:
        raise UserError(f"{data.path} has {len(rows)} rows: bring at least 3, one for each split")
    splits = without_leaks(split(rows, data))
    prove_disjoint(splits)
    dropped = len(rows) - sum(map(len, splits.values()))
    splits["calibration"] = shuffled(splits["train"], f"{data.seed}:calibration")
    write_splits(splits)
    counts = ", ".join(f"{name} {len(members)}" for name, members in splits.items())
    left_out = f"; left out, their prompt being held out: {dropped}" if dropped else ""
    return f"{PREPARED} from {len(rows)} rows ({counts}{left_out})"


def split(rows: list[Conversation], data: Data) -> Splits:
    """Hold out whole groups first, then wordings of every remaining (group, fact)."""
    transfer, validation = held_out_groups(rows, data)
    splits: Splits = {"train": [], "validation": [], "test": []}
    units: dict[tuple, list[Conversation]] = defaultdict(list)
    for row in rows:
        group, fact = comparable(row.group), comparable(row.fact)
        if group in transfer:
            splits["test"].append(replace(row, kind="transfer"))
        elif group in validation:
            splits["validation"].append(replace(row, kind="transfer"))
        else:
            units[group, fact].append(replace(row, kind="recall"))
    for members in units.values():
        first = members[0]
        deal(members, f"{data.seed}:{first.group}:{first.fact}", data, splits)
    return splits


def held_out_groups(rows: list[Conversation], data: Data) -> tuple[set[str], set[str]]:
    """Draw the groups kept for transfer (test) and for validation, as `comparable` writes them."""
    names = sorted({row.group for row in rows if row.group is not None})
    groups = list(dict.fromkeys(map(comparable, names)))
    wanted = data.transfer_groups + data.validation_groups
    if not groups:
        return set(), set()
    if wanted >= len(groups):
        raise UserError(
            f"data.transfer_groups + data.validation_groups is {wanted}: "
            f"must be below the {len(groups)} groups of {data.path}"
        )
    drawn = shuffled(groups, f"{data.seed}:groups")
    return set(drawn[: data.transfer_groups]), set(drawn[data.transfer_groups : wanted])


def deal(members: list[Conversation], seed: str, data: Data, splits: Splits) -> None:
    """Deal the wordings of one fact (or of a file without facts) to the splits, repeats together."""
    wordings: dict[str, list[Conversation]] = defaultdict(list)
    for row in members:
        wordings[prompt_of(row)].append(row)
    held_out = len(wordings) > 2
    tests = max(1, round(len(wordings) * data.test_share)) if held_out else 0
    validations = max(1, round(len(wordings) * data.validation_share)) if held_out else 0
    homes = ["test"] * tests + ["validation"] * validations
    for number, wording in enumerate(shuffled(list(wordings), seed)):
        splits[homes[number] if number < len(homes) else "train"] += wordings[wording]


def without_leaks(splits: Splits) -> Splits:
    """Leave out rows that would teach a held-out prompt: test keeps it, then validation."""
    held_out: set[str] = set()
    clean: Splits = {}
    # in order of worth: a leak into test makes the figures wrong, one into train only costs a row
    for name in ("test", "validation", "train"):
        clean[name] = [row for row in splits[name] if held_out.isdisjoint(prompts_of(row))]
        held_out |= {prompt_of(row) for row in clean[name]}
        if not clean[name]:
            raise UserError(
                f"the {name} split is empty: bring more rows, or change the shares in data.*"
            )
    return {name: clean[name] for name in ("train", "validation", "test")}


def prove_disjoint(splits: Splits) -> None:
    """Raise if any prompt, as `comparable` writes it, stands in two splits."""
    home: dict[str, str] = {}
    for name in ("test", "validation", "train"):
        for row in splits[name]:
            for prompt in prompts_of(row):
                if home.get(prompt, name) != name:
                    raise UserError(f"{prompt!r} is in {name} and in {home[prompt]}")
        home |= {prompt_of(row): name for row in splits[name]}


def prompts_of(row: Conversation) -> list[str]:
    """Return what stands before each of a row's answers: all of them are learned, if it is trained on.

    What `comparable` leaves out does not make another prompt, nor does the system turn.
    """
    texts = [comparable(turn["content"]) or "" for turn in row.messages if turn["role"] != "system"]
    return ["\n".join(texts[:answer]) for answer in range(1, len(texts), 2)]


def comparable(text: str | None) -> str | None:
    """Return a text without what a reader does not see as a difference; the data itself stays as it is.

    Case, spacing, the Unicode form (an é of one code point or two, full-width letters), curly quotes, the
    kind of dash, and characters that are not seen: zero-width, soft hyphen, variation selectors. Rather too
    much is alike than too little: 5² and 52 share a split.
    """
    if text is None or text.isascii():
        return text and " ".join(text.lower().split())
    seen = "".join(c for c in text if unicodedata.category(c) != "Cf").translate(LOOKS_LIKE)
    folded = unicodedata.normalize("NFKC", seen).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def prompt_of(row: Conversation) -> str:
    """Return what stands before the reference answer, without what makes no other prompt."""
    return prompts_of(row)[-1]


def shuffled(items: list, seed: str) -> list:
    """Return the items in an order that the seed alone decides."""
    return random.Random(seed).sample(items, len(items))


def write_splits(splits: Splits) -> None:
    """Write every split as JSONL, all or nothing."""
    with written_beside(PREPARED) as folder:
        folder.mkdir()
        for name, members in splits.items():
            write_conversations(folder / f"{name}.jsonl", members)


if __name__ == "__main__":
    run(prepare, COST)
