"""A conversation as `prepare` writes it and every later stage reads it: one JSON object a line.

rows = read_conversations(Path("data/prepared/train.jsonl"))
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.core.files import read_jsonl

Turn = dict[str, Any]  # role and content, and reasoning where the data has some


@dataclass(frozen=True)
class Conversation:
    """Turns of user and assistant, the last one the reference answer, and what is known of them.

    `group` and `fact` say what is asked and of what (the telephone code, of Accra): all wordings of one fact
    of one group are one unit, and transfer is measured on groups that were held out.
    """

    messages: list[Turn]
    answer: str | None = None  # the part of the reference that must come, word for word
    group: str | None = None
    fact: str | None = None
    tools: list[dict[str, Any]] | None = None  # descriptions, as the chat template takes them
    source: str = "a chat"  # file:line, for messages about the row
    kind: str | None = None  # recall or transfer, once it is in a split

    @property
    def question(self) -> str:
        """The text of the last user turn."""
        return next(turn["content"] for turn in reversed(self.messages) if turn["role"] == "user")

    @property
    def reference(self) -> str:
        """The text of the last turn, the assistant's reference answer."""
        return self.messages[-1]["content"]


def read_conversations(path: Path) -> list[Conversation]:
    """Read a file that `write_conversations` wrote."""
    return [Conversation(**row) for row in read_jsonl(path)]


def write_conversations(path: Path, rows: Iterable[Conversation]) -> None:
    """Write conversations as JSON Lines; one without tools has no such key."""
    lines = []
    for row in rows:
        values = asdict(row)
        if not row.tools:
            del values["tools"]
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
