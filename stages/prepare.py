"""Split the questions and answers into train, validation, test and calibration sets.

    python -m stages.prepare         # conf/data says which file and how

Whole groups (places) are held out to measure transfer; of every other (group, fact) some wordings are
held out to measure recall. A file without those columns is split at random. Rows are written in TRL's
conversational prompt-completion format. No prompt stands in two splits.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from stages.chats import question_of
from stages.errors import UserError
from stages.running import run, written_beside
from stages.settings import Data, Settings

PREPARED = Path("data/prepared")
Row = dict[str, Any]
Splits = dict[str, list[Row]]


def prepare(settings: Settings) -> str:
    """Read the rows, split them, prove that the splits are disjoint, write them."""
    data = settings.data
    rows = read_rows(Path(data.path), data)
    splits = without_leaks(split(rows, data))
    prove_disjoint(splits)
    splits["calibration"] = shuffled(splits["train"], f"{data.seed}:calibration")
    with written_beside(PREPARED) as folder:
        folder.mkdir()
        for name, members in splits.items():
            write_rows(folder / f"{name}.jsonl", members)
    counts = ", ".join(f"{name} {len(members)}" for name, members in splits.items())
    return f"{PREPARED} from {len(rows)} rows ({counts})"


def read_rows(path: Path, data: Data) -> list[Row]:
    """Read a JSONL file. Raises `UserError` with the line number of the first broken row."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # U+2028 may stand inside a text
    except OSError as error:
        raise UserError(f"cannot read data.path {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    rows = [
        parse_row(line, f"{path} line {number}", data)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if len(rows) < 3:
        raise UserError(f"{path} has {len(rows)} rows: at least 3 are needed, one for each split")
    return rows


def parse_row(line: str, where: str, data: Data) -> Row:
    """Turn one line into a row of prompt, completion, answer, group and fact."""
    try:
        columns = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(columns, dict):
        raise UserError(f"{where} is not a JSON object")
    system = [{"role": "system", "content": data.system}] if data.system else []
    prompt = fill(data.prompt, columns, f"{where}, data.prompt")
    response = fill(data.response, columns, f"{where}, data.response")
    answer = columns.get(data.answer_column)
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise UserError(f"{where}: column {data.answer_column!r} is not a text")
    return {
        "messages": [
            *system,
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ],
        "answer": answer,
        "group": label(columns.get(data.group_column), f"{where}: column {data.group_column!r}"),
        "fact": label(columns.get(data.fact_column), f"{where}: column {data.fact_column!r}"),
    }


def label(value: Any, where: str) -> str | None:
    """Return what names a row's group or fact as text; numbers name some too."""
    if value is None or (isinstance(value, (str, int)) and not isinstance(value, bool)):
        return None if value is None else str(value)
    raise UserError(f"{where} is neither a text nor a whole number")


def fill(template: str, columns: dict[str, Any], where: str) -> str:
    """Fill a template with a row's columns; every column that it names must hold text."""
    try:
        text = template.format_map({name: _text(value) for name, value in columns.items()})
    except KeyError as error:
        named = ", ".join(columns) or "none"
        raise UserError(f"{where}: no text column {error} (columns: {named})") from None
    except (ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{where}: bad template {template!r}: {error}") from None
    if not text.strip():
        raise UserError(f"{where}: the text is empty")
    return text


def _text(value: Any) -> Any:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return value
    return _NotText()


class _NotText:
    """Stands for a column that is no text, so that naming it in a template is an error."""

    def __format__(self, spec: str) -> str:
        raise ValueError("a column that it names holds no text")


def split(rows: list[Row], data: Data) -> Splits:
    """Hold out whole groups first, then wordings of every remaining (group, fact)."""
    transfer, validation = held_out_groups(rows, data)
    splits: Splits = {"train": [], "validation": [], "test": []}
    units: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if row["group"] in transfer:
            splits["test"].append(row | {"kind": "transfer"})
        elif row["group"] in validation:
            splits["validation"].append(row | {"kind": "transfer"})
        else:
            units[row["group"], row["fact"]].append(row | {"kind": "recall"})
    for (group, fact), members in units.items():
        deal(members, f"{data.seed}:{group}:{fact}", data, splits)
    return splits


def held_out_groups(rows: list[Row], data: Data) -> tuple[set[str], set[str]]:
    """Draw the groups kept for transfer (test) and for validation."""
    groups = sorted({row["group"] for row in rows if row["group"] is not None})
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


def deal(members: list[Row], seed: str, data: Data, splits: Splits) -> None:
    """Deal the wordings of one fact (or of a file without facts) to the splits, repeats together."""
    wordings: dict[str, list[Row]] = defaultdict(list)
    for row in members:
        wordings[prompt_of(row)].append(row)
    held_out = len(wordings) > 2
    tests = max(1, round(len(wordings) * data.test_share)) if held_out else 0
    validations = max(1, round(len(wordings) * data.validation_share)) if held_out else 0
    homes = ["test"] * tests + ["validation"] * validations
    for number, wording in enumerate(shuffled(list(wordings), seed)):
        splits[homes[number] if number < len(homes) else "train"] += wordings[wording]


def without_leaks(splits: Splits) -> Splits:
    """Drop rows whose prompt also stands in a held-out split: test keeps it, then validation."""
    seen: set[str] = set()
    clean: Splits = {}
    for name in ("test", "validation", "train"):
        clean[name] = [row for row in splits[name] if prompt_of(row) not in seen]
        seen |= {prompt_of(row) for row in clean[name]}
        if not clean[name]:
            raise UserError(f"the {name} split is empty: more rows, or other shares in data.*")
    return {name: clean[name] for name in ("train", "validation", "test")}


def prove_disjoint(splits: Splits) -> None:
    """Raise if any prompt, ignoring case and spacing, stands in two splits."""
    home: dict[str, str] = {}
    for name, rows in splits.items():
        for row in rows:
            if home.setdefault(prompt_of(row), name) != name:
                raise UserError(f"{prompt_of(row)!r} is in {home[prompt_of(row)]} and in {name}")


def prompt_of(row: Row) -> str:
    """Return the user's words without case and spacing, which do not make another prompt."""
    return " ".join(question_of(row).lower().split())


def shuffled(items: list, seed: str) -> list:
    """Return the items in an order that the seed alone decides."""
    return random.Random(seed).sample(items, len(items))


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows as JSONL."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    run(prepare)
