"""Preparing data: any user's JSON Lines, all bad rows named at once, splits that share no prompt."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from stages import prepare
from stages.core.errors import UserError
from stages.core.settings import validate
from stages.text.conversation import Conversation, read_conversations, write_conversations
from stages.text.layouts import import_conversations
from support.project import ROOT


@pytest.fixture
def data(params):
    """Return the data settings, changed by keyword."""

    def changed(**changes):
        params["data"] |= changes
        return validate(params).data

    return changed


def written(path, rows) -> str:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def splits_of(data) -> prepare.Splits:
    return prepare.without_leaks(prepare.split(import_conversations(Path(data.path), data), data))


def test_no_prompt_of_the_travel_questions_is_in_two_splits(data):
    splits = splits_of(data())
    prepare.prove_disjoint(splits)
    assert {row.kind for row in splits["test"]} == {"recall", "transfer"}


def test_transfer_places_are_never_trained_and_recalled_facts_always_are(data):
    splits = splits_of(data())
    trained = {(row.group, row.fact) for row in splits["train"]}
    for row in splits["test"]:
        if row.kind == "recall":
            assert (row.group, row.fact) in trained
        else:
            assert row.group not in {place for place, _ in trained}


def test_a_leak_is_found(data):
    splits = splits_of(data())
    splits["train"].append(splits["test"][0])
    with pytest.raises(UserError, match="is in train and in test"):
        prepare.prove_disjoint(splits)


def test_any_jsonl_works_with_its_own_columns(data, tmp_path):
    rows = [{"q": f"question {n}?", "a": f"answer {n}"} for n in range(20)]
    path = written(tmp_path / "mine.jsonl", rows)
    splits = splits_of(data(path=path, prompt="Q: {q}", response="{a}"))
    assert sum(len(rows) for rows in splits.values()) == 20
    assert splits["train"][0].messages[0]["content"].startswith("Q: question")


def test_a_repeated_prompt_stays_in_one_split(data, tmp_path):
    rows = [{"prompt": f"question {n % 6}?", "response": f"answer {n}"} for n in range(30)]
    prepare.prove_disjoint(splits_of(data(path=written(tmp_path / "twice.jsonl", rows))))


GOOD = '{"prompt": "p", "response": "r"}'
BROKEN = {
    '{"prompt": "half': "is not JSON",
    "[1, 2]": "is a list, not a JSON object",
    '"just a text"': "is a text, not a JSON object",
    '{"prompt": "p"}': "has no column 'response', which data.response names (columns: prompt)",
    '{"prompt": "", "response": "r"}': "the text of data.prompt is empty",
    '{"prompt": "p", "response": " \\n "}': "'response' is empty",
    '{"prompt": "p", "response": 42}': "'response' is the number 42, not a text",
    '{"prompt": "p", "response": null}': "'response' is null, not a text",
    '{"prompt": ["p"], "response": "r"}': "'prompt' is a list, not a text",
    '{"prompt": "p", "response": NaN}': "holds NaN, which is not JSON",
    '{"prompt": "p", "prompt": "p", "response": "r"}': "has the key 'prompt' twice",
    '{"prompt": "half \\ud83d", "response": "r"}': "'prompt' holds half a character (\\ud83d",
    '{"prompt": "p", "response": "r", "answer": 3}': "'answer' is the number 3, not a text",
    '{"prompt": "p", "response": "r", "system": 3}': "'system' is the number 3, not a text",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_row_is_named_by_its_line(data, tmp_path, line):
    path = tmp_path / "broken.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(UserError) as error:
        import_conversations(path, data())
    assert str(error.value).startswith(f"{path}:3: {BROKEN[line]}")
    assert "\n" not in str(error.value)


def test_all_broken_rows_are_listed_at_once(data, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join([GOOD, *BROKEN]))
    with pytest.raises(UserError) as error:
        import_conversations(path, data())
    head, *lines = str(error.value).split("\n")
    assert head == f"{len(BROKEN)} of {len(BROKEN) + 1} rows cannot be used, nothing is written"
    assert [line.split(":")[1] for line in lines] == [str(n + 2) for n in range(len(BROKEN))]


def test_a_long_list_of_broken_rows_ends_with_a_count(data, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join([GOOD, *["{}"] * 50]))
    with pytest.raises(UserError) as error:
        import_conversations(path, data())
    assert len(str(error.value).split("\n")) == 22
    assert str(error.value).endswith("and 30 more")


UNREADABLE = {
    b"": "has no rows",
    b"\n  \n": "has no rows",
    b'[{"prompt": "p", "response": "r"}]': "is one JSON array, not JSON Lines",
    f"{GOOD}\n".encode("utf-16"): ":1: is UTF-16",
    f'{GOOD}\n{{"prompt": "caf\u00e9", "response": "r"}}'.encode("latin-1"): (
        ":2: byte 48 (0xe9) is not UTF-8"
    ),
    b'{"question": "q", "reply": "r"}': "has the keys question, reply, which fit none of the layouts",
    b'{"prompt": "p", "response": "r", "messages": []}': "fit messages and prompt_response",
}


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_file_that_is_no_json_lines_of_a_known_layout_is_refused_in_one_line(
    data, tmp_path, content
):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        import_conversations(path, data())
    assert UNREADABLE[content] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(data, tmp_path):
    with pytest.raises(UserError, match=r"cannot read data\.path"):
        import_conversations(tmp_path / "nowhere.jsonl", data())


def test_a_byte_order_mark_and_windows_line_ends_belong_to_no_text(data, tmp_path):
    lines = [GOOD, "  ", '{"prompt": "q", "response": "one\\r\\ntwo"}']
    (tmp_path / "mine.jsonl").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    rows = import_conversations(tmp_path / "mine.jsonl", data())
    assert [row.messages[-1]["content"] for row in rows] == ["r", "one\r\ntwo"]
    assert [row.source for row in rows] == ["mine.jsonl:1", "mine.jsonl:3"]


SYSTEM, ASKED, ANSWERED = 'Reply like {"city": name}.', "Eat in {city}? 100%s", "In {} of 100%."
LAYOUTS = {
    "prompt_response": {"system": SYSTEM, "prompt": ASKED, "response": ANSWERED},
    "alpaca": {"system": SYSTEM, "instruction": ASKED, "input": "", "output": ANSWERED},
    "messages": {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": ASKED},
            {"role": "assistant", "content": ANSWERED},
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": SYSTEM},
            {"from": "human", "value": ASKED},
            {"from": "gpt", "value": ANSWERED},
        ]
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("named", [False, True])
def test_every_layout_gives_the_same_conversation(data, tmp_path, layout, named):
    path = written(tmp_path / "mine.jsonl", [LAYOUTS[layout]])
    (row,) = import_conversations(Path(path), data(layout=layout if named else "auto"))
    assert row.messages == LAYOUTS["messages"]["messages"]


def test_the_input_of_an_alpaca_row_follows_its_instruction(data, tmp_path):
    row = {"instruction": "Translate.", "input": "Good day", "output": "Bom dia"}
    path = written(tmp_path / "mine.jsonl", [row])
    (row,) = import_conversations(Path(path), data())
    assert row.messages[0]["content"] == "Translate.\n\nGood day"


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": f"{n}"} for n, role in enumerate(roles)]}


DISORDERED = {
    ("user", "user", "assistant"): "turn 2 is the user's",
    ("assistant", "user", "assistant"): "turn 1 is the assistant's",
    ("user", "assistant", "user"): "does not end with an answer",
    ("user", "tool", "assistant"): "turn 2: role 'tool'",
    ("user", "assistant", "system", "user", "assistant"): "turn 3 is the system's",
    ("system",): "does not end with an answer",
    (): "'messages' is an empty list",
}


@pytest.mark.parametrize("roles", DISORDERED)
def test_turns_out_of_order_are_named(data, tmp_path, roles):
    path = written(tmp_path / "mine.jsonl", [turns(*roles)])
    with pytest.raises(UserError, match=DISORDERED[roles]):
        import_conversations(Path(path), data())


def test_later_turns_are_kept(data, tmp_path):
    asked = turns("user", "assistant", "user", "assistant")
    (row,) = import_conversations(Path(written(tmp_path / "mine.jsonl", [asked])), data())
    assert row.messages == asked["messages"]


def conversation(*texts: str) -> dict:
    roles = ["user", "assistant"] * (len(texts) // 2)
    return {
        "messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)],
    }


def test_no_held_out_prompt_is_an_earlier_turn_of_a_trained_conversation():
    goes_on = conversation("Where is the pier?", "There.", "And the fort?", "Here.")
    other = conversation("And the fort?", "Here.")
    splits = {
        "train": [Conversation(**goes_on), Conversation(**other)],
        "validation": [Conversation(**conversation("Is it far?", "No."))],
        "test": [Conversation(**conversation("where is  the pier?", "There."))],
    }
    assert prepare.without_leaks(splits)["train"] == [Conversation(**other)]
    with pytest.raises(UserError, match="'where is the pier\\?' is in train and in test"):
        prepare.prove_disjoint(splits)


FORMS = {
    "one code point or two": ("Where is the caf\u00e9?", "Where is the cafe\u0301?"),
    "full width": ("Where is it?", "\uff37here is it\uff1f"),
    "zero width": ("Where is it?", "Where\u200b is i\u2060t?\ufeff"),
    "soft hyphen": ("Where is it?", "Whe\u00adre is it?"),
    "curly quotes": ('Where\'s the "pier"?', "Where\u2019s the \u201cpier\u201d?"),
    "dashes": ("Where - here?", "Where \u2013 here?"),
    "no-break space": ("Where is it?", "Where\u00a0is\u202fit?"),
    "case that takes two letters": ("Wo ist die STRASSE?", "Wo ist die stra\u00dfe?"),
    "emoji with a selector": ("Where? \u2764", "Where? \u2764\ufe0f"),
}


@pytest.mark.parametrize("one", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow
def test_prompts_that_look_alike_stay_in_one_split_as_they_are(data, tmp_path, one, seed):
    rows = [{"prompt": f"{n} {text}", "response": "x"} for n in range(10) for text in one]
    path = written(tmp_path / "mine.jsonl", rows)
    splits = splits_of(data(path=path, seed=seed))
    homes = {row.messages[0]["content"]: name for name, rows in splits.items() for row in rows}
    assert set(homes) == {row["prompt"] for row in rows}
    assert all(homes[f"{n} {one[0]}"] == homes[f"{n} {one[1]}"] for n in range(10))
    prepare.prove_disjoint(splits)


def test_a_prompt_with_another_letter_is_another_prompt():
    assert prepare.comparable("Where is Malm\u00f6?") != prepare.comparable("Where is Malmo?")


def test_a_held_out_group_is_held_out_in_every_unicode_form(data, tmp_path):
    forms = ["M\u00e1laga {}", "Ma\u0301laga {}"]
    rows = [
        {"prompt": f"{n} {m} {form}?", "response": "x", "place": form.format(n), "fact": "f"}
        for n in range(20)
        for m in range(3)
        for form in forms
    ]
    splits = splits_of(data(path=written(tmp_path / "mine.jsonl", rows)))
    held_out = {prepare.comparable(r.group) for r in splits["test"] if r.kind == "transfer"}
    assert len(held_out) == 8
    assert held_out.isdisjoint(prepare.comparable(row.group) for row in splits["train"])


def said(**parts) -> dict:
    """A conversation whose answer has further parts."""
    return {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"} | parts,
        ]
    }


LOST = {
    "turn 2 has tool_calls": said(content=None, tool_calls=[{"id": "1"}]),
    "turn 2 has function_call": said(function_call={"name": "f"}),
    "turn 2 has name": said(name="bob"),
    "turn 2 has refusal": said(refusal="no"),
    "turn 2 has audio": said(audio={"id": "x"}),
    "turn 2 has prefix": said(prefix=True),
    "turn 2 has train False": said(train=False),
    "turn 2 has a weight": said(weight=0),
    "turn 1 has images": {"messages": [{"role": "user", "content": "q", "images": ["x"]}]},
    "turn 1 has thinking": {"messages": [{"role": "user", "content": "q", "thinking": "x"}]},
    "has functions": said() | {"functions": [{"name": "f"}]},
    "has chat_template_kwargs": said() | {"chat_template_kwargs": {"enable_thinking": False}},
    "has images": said() | {"images": ["a.png"]},
    "has history": {"prompt": "p", "response": "r", "history": [["q", "a"]]},
    "has rejected": {"prompt": "p", "response": "r", "rejected": "s"},
    "'tools' is a text that is not JSON": said() | {"tools": "a hammer"},
    "'tools' is not a list of objects": said() | {"tools": {"name": "f"}},
    "'history' 1 is not a pair": {"instruction": "i", "output": "o", "history": ["q", "a"]},
    "'history' 1 is empty": {"instruction": "i", "output": "o", "history": [["q", ""]]},
}


@pytest.mark.parametrize("reason", LOST)
def test_a_part_that_would_be_lost_is_named(data, tmp_path, reason):
    path = written(tmp_path / "mine.jsonl", [LOST[reason]])
    with pytest.raises(UserError, match=f"mine.jsonl:1: {reason}"):
        import_conversations(Path(path), data())


def test_parts_that_are_empty_or_mean_nothing_are_no_reason_to_refuse(data, tmp_path):
    row = said(name=None, tool_calls=[], train=True, weight=1, id="x", reasoning_content="")
    row |= {"id": 7, "source": "web", "tools": "[]", "functions": None, "metadata": {"a": 1}}
    (read,) = import_conversations(Path(written(tmp_path / "mine.jsonl", [row])), data())
    assert read.messages == said()["messages"]
    assert read.tools is None


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_to_the_chat_template(data, tmp_path, key):
    row = said(**{key: "because"})
    (read,) = import_conversations(Path(written(tmp_path / "mine.jsonl", [row])), data())
    assert read.messages == row["messages"]


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_go_to_the_chat_template(data, tmp_path, tools):
    path = written(tmp_path / "mine.jsonl", [said() | {"tools": tools}])
    (read,) = import_conversations(Path(path), data())
    assert read.tools == [{"name": "f"}]


def test_the_history_of_an_alpaca_row_becomes_earlier_turns(data, tmp_path):
    row = {"instruction": "q2", "output": "a2", "history": [["q1", "a1"]], "system": "Be brief."}
    (read,) = import_conversations(Path(written(tmp_path / "mine.jsonl", [row])), data())
    system = {"role": "system", "content": "Be brief."}
    assert read.messages == [system, *conversation("q1", "a1", "q2", "a2")["messages"]]


def test_columns_that_nobody_named_in_a_template_are_ignored(data, tmp_path):
    path = written(tmp_path / "mine.jsonl", [{"q": "p", "chosen": "r", "rejected": "s"}])
    (read,) = import_conversations(Path(path), data(prompt="{q}", response="{chosen}"))
    assert read.messages == conversation("p", "r")["messages"]


@pytest.mark.parametrize("name", ["mine.jsonl", "data/mine.txt"])
def test_git_keeps_every_byte_of_a_data_file(tmp_path, name):
    content = "\ufeff{}\r\n{}\n".encode()
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    (origin / name).parent.mkdir(parents=True)
    (origin / name).write_bytes(content)
    shutil.copy(ROOT / ".gitattributes", origin)
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "data"]):
        subprocess.run(["git", "-C", origin, *words], check=True)
    options = ["-c", "core.autocrlf=true"]
    subprocess.run(["git", *options, "clone", "-q", origin, clone], check=True)
    assert (clone / name).read_bytes() == content


def test_numbers_name_groups_as_texts_do(data, tmp_path):
    rows = [
        {"prompt": f"{n}?", "response": "x", "place": n % 20, "fact": n % 2} for n in range(100)
    ]
    splits = splits_of(data(path=written(tmp_path / "mine.jsonl", rows)))
    assert {row.kind for row in splits["test"]} == {"recall", "transfer"}


def test_a_group_that_is_a_list_is_named_with_its_line(data, tmp_path):
    rows = [{"prompt": f"{n}?", "response": "x", "place": ["a"]} for n in range(5)]
    with pytest.raises(UserError, match=r"1: 'place' is a list, neither a text nor a whole"):
        splits_of(data(path=written(tmp_path / "mine.jsonl", rows)))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_line_separator_inside_a_text_ends_no_row(separator, data, tmp_path):
    rows = [{"prompt": f"a{separator}{n}?", "response": "x"} for n in range(20)]
    read = import_conversations(Path(written(tmp_path / "mine.jsonl", rows)), data())
    write_conversations(tmp_path / "train.jsonl", read)
    assert read_conversations(tmp_path / "train.jsonl") == read
    assert read[0].messages[0]["content"] == f"a{separator}0?"
