"""Read a user's JSON Lines file as conversations, whatever layout its rows have.

    rows = import_conversations(Path("mine.jsonl"), settings.data)

Four layouts are known: prompt_response (columns put into templates), messages (OpenAI), sharegpt and alpaca.
All rows that cannot be used are named in one error, each with its line and the reason; so are rows with a
part that means something and is not trained on. Columns without a known meaning, such as an id, are ignored.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.core.settings import Data
from stages.text.conversation import Conversation, Turn

Row = dict[str, Any]  # a line of the file, whatever its columns

SHOWN = 20  # bad rows that are listed; the others are counted
OWN_TEMPLATES = ("{prompt}", "{response}")  # what conf/data has until a user writes others
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant"}
KEYS = {
    "messages": ["messages"],
    "sharegpt": ["conversations"],
    "alpaca": ["instruction", "output"],
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of an answer, by model family
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# parts that mean something and are not trained on
OF_A_TURN = (
    *("tool_calls", "function_call", "tool_call_id", "name", "refusal", "prefix", "train_detail"),
    *MEDIA,
)
OF_A_ROW = (
    *("functions", "function_call", "documents", "chat_template_kwargs", "history"),
    *("chosen", "rejected", "kto_tag"),
    *MEDIA,
)
IS_TRAINED_ON = ("train", "trainable", "loss")  # keys of a turn that may only be true


class BadRow(ValueError):
    """One row that cannot be used: the text says why."""


def import_conversations(path: Path, data: Data) -> list[Conversation]:
    """Return every row as a conversation. Raises one `UserError` that names all rows that cannot be used."""
    objects, bad = parse_lines(path)
    if not objects and not bad:
        raise UserError(f"{path} has no rows: bring JSON Lines, one JSON object per line")
    rows: list[Conversation] = []
    if objects:
        parse = PARSERS[layout_of(path, objects, data)]
        for number, columns in objects.items():
            try:
                rows.append(conversation_of(columns, parse, data, f"{path.name}:{number}"))
            except BadRow as error:
                bad[number] = str(error)
    if bad:
        raise UserError(listing(path, bad, len(rows) + len(bad)))
    return rows


def listing(path: Path, bad: dict[int, str], count: int) -> str:
    """Return the bad rows, one a line."""
    lines = [f"{path}:{number}: {bad[number]}" for number in sorted(bad)]
    if len(lines) == 1:
        return lines[0]
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    head = f"{len(bad)} of {count} rows cannot be used, nothing is written"
    return "\n".join([head, *lines[:SHOWN], *more])


def parse_lines(path: Path) -> tuple[dict[int, Row], dict[int, str]]:
    """Return the JSON objects and what is wrong with the other lines, both by line number."""
    objects: dict[int, Row] = {}
    bad: dict[int, str] = {}
    text = read_text(path)
    refuse_array(path, text)
    for number, line in enumerate(text.split("\n"), start=1):  # U+2028 may stand inside a text
        try:
            if line.strip(" \t\r"):
                objects[number] = parse_line(line)
        except BadRow as error:
            bad[number] = str(error)
    return objects, bad


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text without a byte order mark. Raises `UserError` with line and byte."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read data.path {path}: {error.strerror}") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}:1: is UTF-16, by its first bytes: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + len(content) - len(error.object)  # without the mark
        line = content.count(b"\n", 0, start) + 1
        raise UserError(
            f"{path}:{line}: byte {start} (0x{content[start]:02x}) is not UTF-8: save the file as UTF-8"
        ) from None


def refuse_array(path: Path, text: str) -> None:
    """Raise `UserError` for a file that is one JSON array."""
    if not text.lstrip().startswith("["):
        return
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return  # one of its lines may begin like that
    raise UserError(
        f"{path} is one JSON array, not JSON Lines: `jq -c '.[]' {path} > lines.jsonl` makes it so"
    )


def parse_line(line: str) -> Row:
    """Return one line's JSON object. Raises `BadRow`."""
    try:
        columns = json.loads(line, object_pairs_hook=without_repeats, parse_constant=refuse_number)
    except json.JSONDecodeError as error:
        raise BadRow(f"is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadRow("is nested too deeply") from None
    except BadRow:  # of the two hooks
        raise
    except ValueError as error:  # Python's limit for the digits of a whole number
        raise BadRow(f"cannot be read: {error}") from None
    if not isinstance(columns, dict):
        raise BadRow(f"is {kind_of(columns)}, not a JSON object")
    return columns


def without_repeats(pairs: list[tuple[str, Any]]) -> Row:
    """Return a JSON object whose keys all differ."""
    columns: Row = {}
    for key, value in pairs:
        if key in columns:
            raise BadRow(f"has the key {key!r} twice")
        columns[key] = value
    return columns


def refuse_number(name: str) -> None:
    """Refuse constants that Python's JSON reader accepts and the standard does not."""
    raise BadRow(f"holds {name}, which is not JSON")


def layout_of(path: Path, objects: dict[int, Row], data: Data) -> str:
    """Return the layout that data.layout names, or the only one that any row has."""
    if data.layout != "auto":
        return data.layout
    if (data.prompt, data.response) != OWN_TEMPLATES:
        return "prompt_response"
    wanted = {"prompt_response": columns_of(data.prompt) + columns_of(data.response)} | KEYS
    found = {
        layout
        for layout, keys in wanted.items()
        if any(all(key in row for key in keys) for row in objects.values())
    }
    if len(found) == 1:
        return found.pop()
    keys = names_of(sorted({key for row in objects.values() for key in row})[:12])
    known = "; ".join(f"{layout}: {', '.join(keys)}" for layout, keys in wanted.items())
    fits = " and ".join(sorted(found)) or "none"
    raise UserError(
        f"{path} has the keys {keys}, which fit {fits} of the layouts ({known}): "
        "name one with data.layout, or your columns with data.prompt and data.response"
    )


def conversation_of(
    columns: Row, parse: Callable[[Row, Data], list[Turn]], data: Data, source: str
) -> Conversation:
    """Return one row's conversation and labels. Raises `BadRow`."""
    messages = with_system(parse(columns, data), columns, data)
    check_order([turn["role"] for turn in messages])
    answer = named(columns, data.answer_column)
    tools = None
    if (data.prompt, data.response) == OWN_TEMPLATES:  # others name the columns that count
        kept = {data.answer_column, data.group_column, data.fact_column}
        kept |= {"history"} if parse is from_alpaca else set()
        refuse_parts(columns, [key for key in OF_A_ROW if key not in kept])
        tools = tools_of(columns)
    return Conversation(
        messages=messages,
        answer=None if answer is None else text_of(answer, repr(data.answer_column)),
        group=label(named(columns, data.group_column), repr(data.group_column)),
        fact=label(named(columns, data.fact_column), repr(data.fact_column)),
        tools=tools or None,
        source=source,
    )


def named(columns: Row, column: str | None) -> Any:
    """Return what stands in the column that a setting names, None where it names none."""
    return None if column is None else columns.get(column)


def tools_of(columns: Row) -> list[Row]:
    """Return the descriptions of a row's tools; some files hold them as JSON in a text."""
    tools = columns.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadRow("'tools' is a text that is not JSON, or is nested too deep") from None
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("'tools' is not a list of objects")
    text_of(json.dumps(tools, ensure_ascii=False), "'tools'")
    return tools


def with_system(messages: list[Turn], columns: Row, data: Data) -> list[Turn]:
    """Put a system turn in front: the row's own, or that of conf/data, or none."""
    if messages and messages[0]["role"] == "system":
        return messages
    own = columns.get("system") if "system" not in columns_of(data.prompt) else None
    text = data.system if own in (None, "") else text_of(own, "'system'")
    return [{"role": "system", "content": text}, *messages] if text else messages


def check_order(roles: list[str]) -> None:
    """Raise `BadRow` unless user and assistant take turns after at most one system turn."""
    turns = roles[1:] if roles[:1] == ["system"] else roles
    first = len(roles) - len(turns) + 1
    for number, role in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if role != wanted:
            raise BadRow(f"turn {first + number} is the {role}'s, where the {wanted}'s must stand")
    if len(turns) % 2 or not turns:
        raise BadRow("does not end with an answer of the assistant")


def from_columns(columns: Row, data: Data) -> list[Turn]:
    """Fill the templates of conf/data with a row's columns."""
    prompt = fill(data.prompt, columns, "data.prompt")
    return exchange(prompt, fill(data.response, columns, "data.response"))


def from_alpaca(columns: Row, _: Data) -> list[Turn]:
    """Join instruction and input, where there is one, by an empty line; `history` stands before them."""
    turns: list[Turn] = []
    history = columns.get("history") or []
    pairs = history if isinstance(history, list) else [history]
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"'history' {number} is not a pair of question and answer")
        turns += exchange(*(text_of(text, f"'history' {number}") for text in pair))
    parts = [text_of(columns.get("instruction"), "'instruction'")]
    if columns.get("input") not in (None, ""):
        parts.append(text_of(columns["input"], "'input'"))
    return turns + exchange("\n\n".join(parts), text_of(columns.get("output"), "'output'"))


def from_messages(columns: Row, _: Data) -> list[Turn]:
    """Read turns of role and content."""
    return list(read_turns(columns, "messages", "role", "content", ROLES))


def from_sharegpt(columns: Row, _: Data) -> list[Turn]:
    """Read turns of from and value."""
    return list(read_turns(columns, "conversations", "from", "value", SHAREGPT_ROLES))


PARSERS = {
    "prompt_response": from_columns,
    "messages": from_messages,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
}


def exchange(prompt: str, response: str) -> list[Turn]:
    """Return one question and its answer as turns."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def read_turns(
    columns: Row, column: str, role_key: str, text_key: str, roles: dict[str, str]
) -> Iterator[Turn]:
    """Yield a list's turns. Raises `BadRow` for a turn that cannot be trained on as it stands."""
    turns = columns.get(column)
    if not isinstance(turns, list) or not turns:
        empty = "an empty list" if turns == [] else kind_of(turns)
        raise BadRow(f"{column!r} is {empty}, not a list of turns")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise BadRow(f"turn {number} is {kind_of(turn)}, not an object")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise BadRow(f"turn {number}: {role_key} {role!r} is none of {', '.join(roles)}")
        refuse_what_would_be_lost(turn, roles[role], f"turn {number}")
        said = {"role": roles[role], "content": text_of(turn.get(text_key), f"turn {number}")}
        reasoning = [key for key in REASONING if turn.get(key)]
        yield said | {key: text_of(turn[key], f"turn {number}: {key}") for key in reasoning}


def refuse_what_would_be_lost(turn: Row, role: str, where: str) -> None:
    """Raise `BadRow` for parts of a turn that mean something and are not trained on."""
    refuse_parts(turn, OF_A_TURN if role == "assistant" else OF_A_TURN + REASONING, f"{where} ")
    if turn.get("weight", 1) not in (None, 1):
        raise BadRow(f"{where} has a weight: every answer is trained on alike")
    for key in IS_TRAINED_ON:
        if turn.get(key) not in (None, True):
            raise BadRow(f"{where} has {key} {turn[key]!r:.20}: every answer is trained on")


def refuse_parts(columns: Row, keys: Iterable[str], where: str = "") -> None:
    """Raise `BadRow` for the first of these keys that holds something."""
    for key in keys:
        if columns.get(key):
            raise BadRow(f"{where}has {key}, which is not trained on: remove it, or the row")


def columns_of(template: str) -> list[str]:
    """Return the columns that a template names. Raises `UserError` for one that is no template."""
    return [column for _, column in parts_of(template) if column is not None]


def parts_of(template: str) -> list[tuple[str, str | None]]:
    """Return a template's pieces: text, and the column behind it or None."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"the template {template!r} is broken: {error}") from None
    if any(column == "" or spec or conversion for _, column, spec, conversion in parts):
        raise UserError(f"the template {template!r}: write {{column}}, and {{{{ }}}} for braces")
    return [(text, column) for text, column, _, _ in parts]


def fill(template: str, columns: Row, name: str) -> str:
    """Put a row's columns into a template; braces inside a column stay what they are."""
    text = ""
    for before, column in parts_of(template):
        text += before
        if column is not None and column not in columns:
            named = names_of(columns) or "none"
            raise BadRow(f"has no column {column!r}, which {name} names (columns: {named})")
        if column is not None:
            value = columns[column]
            text += value if value == "" else text_of(value, repr(column))
    return text_of(text, f"the text of {name}")


def text_of(value: Any, name: str) -> str:
    """Return a value that is a text with something in it. Raises `BadRow`."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {kind_of(value)}, not a text")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise BadRow(f"{name} holds half a character ({half}, a lone surrogate)") from None
    return value


def label(value: Any, name: str) -> str | None:
    """Return what names a row's group or fact as text; whole numbers name some too."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"{name} is {kind_of(value)}, neither a text nor a whole number")
    return text_of(value, name)


def names_of(keys: Iterable[str]) -> str:
    """Return keys beside each other; a line break or half a character in one is written as an escape."""
    return ", ".join(key if key.isprintable() else repr(key) for key in keys)


def kind_of(value: Any) -> str:
    """Say what a JSON value is."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {str(value)[:20]}"
    kinds: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return kinds[type(value)]
