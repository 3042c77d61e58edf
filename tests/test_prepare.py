"""Preparing data: splits that share no prompt, any user's JSONL, errors with a line number."""

import json

import pytest

from stages import prepare
from stages.chats import read_rows
from stages.errors import UserError
from stages.settings import validate


@pytest.fixture
def data(params):
    """Return the data settings, changed by keyword."""

    def changed(**changes):
        params["data"] |= changes
        return validate(params).data

    return changed


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def splits_of(data) -> prepare.Splits:
    from pathlib import Path

    return prepare.without_leaks(prepare.split(prepare.read_rows(Path(data.path), data), data))


def test_no_prompt_of_the_travel_questions_is_in_two_splits(data):
    splits = splits_of(data())
    prepare.prove_disjoint(splits)
    assert {row["kind"] for row in splits["test"]} == {"recall", "transfer"}


def test_transfer_places_are_never_trained_and_recalled_facts_always_are(data):
    splits = splits_of(data())
    trained = {(row["group"], row["fact"]) for row in splits["train"]}
    for row in splits["test"]:
        if row["kind"] == "recall":
            assert (row["group"], row["fact"]) in trained
        else:
            assert row["group"] not in {place for place, _ in trained}


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
    assert splits["train"][0]["prompt"][-1]["content"].startswith("Q: question")


def test_a_repeated_prompt_stays_in_one_split(data, tmp_path):
    rows = [{"prompt": f"question {n % 6}?", "response": f"answer {n}"} for n in range(30)]
    prepare.prove_disjoint(splits_of(data(path=written(tmp_path / "twice.jsonl", rows))))


GOOD = '{"prompt": "p", "response": "r"}'
BROKEN = {
    '{"prompt": "half': "line 2 is not JSON",
    "[1, 2]": "line 2 is not a JSON object",
    '{"prompt": "p"}': "line 2, data.response: no text column 'response'",
    '{"prompt": "", "response": "r"}': "line 2, data.prompt: the text is empty",
    '{"prompt": ["p"], "response": "r"}': "line 2, data.prompt",
    '{"prompt": "p", "response": "r", "answer": 3}': "line 2: column 'answer' is not a text",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_row_is_named_by_its_line(data, tmp_path, line):
    path = tmp_path / "broken.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(UserError) as error:
        prepare.read_rows(path, data())
    assert BROKEN[line] in str(error.value)


def test_a_missing_file_and_too_few_rows_are_named(data, tmp_path):
    with pytest.raises(UserError, match=r"cannot read data\.path"):
        prepare.read_rows(tmp_path / "nowhere.jsonl", data())
    with pytest.raises(UserError, match="has 1 rows"):
        prepare.read_rows(tmp_path / written(tmp_path / "few.jsonl", [json.loads(GOOD)]), data())


def test_numbers_name_groups_as_texts_do(data, tmp_path):
    rows = [
        {"prompt": f"{n}?", "response": "x", "place": n % 20, "fact": n % 2} for n in range(100)
    ]
    splits = splits_of(data(path=written(tmp_path / "mine.jsonl", rows)))
    assert {row["kind"] for row in splits["test"]} == {"recall", "transfer"}


def test_a_group_that_is_a_list_is_named_with_its_line(data, tmp_path):
    rows = [{"prompt": f"{n}?", "response": "x", "place": ["a"]} for n in range(5)]
    with pytest.raises(UserError, match=r"line 1: column 'place' is neither a text nor a whole"):
        splits_of(data(path=written(tmp_path / "mine.jsonl", rows)))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_a_line_separator_inside_a_text_ends_no_row(separator, data, tmp_path):
    rows = [{"prompt": f"a{separator}{n}?", "response": "x"} for n in range(20)]
    splits = splits_of(data(path=written(tmp_path / "mine.jsonl", rows)))
    prepare.write_rows(tmp_path / "train.jsonl", splits["train"])
    assert read_rows(tmp_path / "train.jsonl") == splits["train"]
