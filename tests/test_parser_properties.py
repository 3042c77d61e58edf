"""The two parsers that meet the world, against anything: hypothesis writes the rows and the overrides.

Each is read as it stands, or refused in plain lines; no other exception gets out, and no text changes.
"""

import json
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lab.experiments import overrides, request
from stages.core.errors import UserError
from stages.core.settings import validate
from stages.text.layouts import import_conversations
from support.project import ROOT

# the same examples on every machine; no limit of time, which a busy machine would exceed
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
repeatable = settings(settings.get_profile("repeatable"), max_examples=300)

TEXTS = st.text(max_size=6)  # lone surrogates too, which json.dumps writes as escapes
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
COLUMNS = st.sampled_from(
    [
        "prompt",
        "response",
        "messages",
        "conversations",
        "instruction",
        "output",
        "input",
        "history",
        "system",
        "tools",
        "answer",
    ]
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant"]) | ANY_JSON,
            "content": WORDS | ANY_JSON,
            "thinking": ANY_JSON,
            "weight": ANY_JSON,
        },
    ),
    max_size=4,
)
ROWS = st.dictionaries(COLUMNS | TEXTS, WORDS | TURNS | ANY_JSON, max_size=4)
LINES = (
    ROWS.map(json.dumps)
    | ANY_JSON.map(json.dumps)
    | st.text(max_size=12).filter(lambda t: "\n" not in t)
)
TOOLS = '{"prompt": "a", "response": "b", "tools": %s}'


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mine.jsonl"


@repeatable
@given(lines=st.lists(LINES, min_size=1, max_size=3))
@example(lines=['{"prompt": "a", "response": "b", "id": ' + "9" * 5000 + "}"])
@example(lines=[TOOLS % json.dumps("[" * 100_000)])
@example(lines=['{"a\\nb": 1}'])
@example(lines=['{"prompt": "a", "x\\ny": 1}', '{"prompt": "a", "response": "b"}'])
def test_any_lines_are_read_or_named_one_by_one(lines, file, params):
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    data = validate(params).data
    if said := refusal(import_conversations, file, data):
        head, *more = said.split("\n")
        assert str(file) in (more[0] if more else head)
        assert all(re.match(rf"{re.escape(str(file))}:[1-9]\d*: ", line) for line in more)
        assert said.replace("\n", "").isprintable()
        return
    for row in import_conversations(file, data):
        line = lines[int(row.source.rpartition(":")[2]) - 1]
        kept = {turn["content"] for turn in row.messages}
        assert kept <= set(texts_in(json.loads(line))) or "instruction" in line  # alpaca joins two


def refusal(function, *words) -> str | None:
    """Return the text of the UserError that a call ends with, None where it does not."""
    try:
        function(*words)
    except UserError as error:
        return str(error)
    return None


def texts_in(value):
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    for inner in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from texts_in(inner)


def laid_out(layout: str, question: str, answer: str) -> dict:
    """Return a row of a layout."""
    return {
        "prompt_response": {"prompt": question, "response": answer},
        "alpaca": {"instruction": question, "output": answer},
        "messages": {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        },
        "sharegpt": {
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
            ]
        },
    }[layout]


@pytest.mark.parametrize("layout", ["prompt_response", "alpaca", "messages", "sharegpt"])
@settings(repeatable, max_examples=60)
@given(pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), escaped=st.booleans())
@example(pairs=[("a\u2028b\x85c\x00", "{prompt}\r\n"), ("\ufeff", "é e\u0301")], escaped=False)
def test_every_text_comes_out_as_it_was_given(layout, pairs, escaped, file, params):
    rows = [json.dumps(laid_out(layout, *pair), ensure_ascii=escaped) for pair in pairs]
    file.write_text("\n".join(rows), encoding="utf-8", newline="\n")
    found = import_conversations(file, validate(params).data)
    assert [tuple(turn["content"] for turn in row.messages) for row in found] == pairs


KEYS = st.sampled_from(
    [
        "finetune.lr",
        "finetune.max_steps",
        "data.path",
        "data.prompt",
        "model",
        "experiment",
        "evaluate/gates",
        "x",
        "../conf",
        "/tmp",
        ".",
        "..",
        "model/tiny",
        "finetune",
        "model.source.corpus",
    ]
)
VALUES = st.sampled_from(
    [
        "5",
        "1e-3",
        "null",
        "true",
        "tiny",
        "quick",
        "[a,b]",
        "{a:1}",
        "'x'",
        "${seed}",
        "${oc.env:HOME}",
        "${x",
        "???",
        "range(1,3)",
        "interval(0,1)",
        "glob(*)",
        "choice(a,b)",
        "shuffle(1,2)",
        "int('a')",
        "float(x)",
        "a@b",
        "../../params",
    ]
)
OVERRIDES = st.text(max_size=20) | st.tuples(
    st.sampled_from(["", "+", "++", "~", "-", "params.yaml:"]),
    KEYS | TEXTS,
    st.sampled_from(["=", "", ":", "@a="]),
    VALUES | TEXTS | st.lists(VALUES, min_size=2, max_size=2).map(",".join),
).map("".join)
LONG = "a" * 5000


@settings(repeatable, max_examples=30)  # each composes
@given(text=OVERRIDES)
@example(text=f"data.prompt={LONG}")
@example(text=f"model={LONG}")
@example(text=f"data.path={LONG}")
@example(text=LONG)
@example(text=f"{LONG}/b=1")
@example(text="data.path='a\nb'")
@example(text="data.pat='a\nb'")
@example(text="data.path='a\0b'")
@example(text="model/tiny\0")
@example(text="data.path=glob(*)")
@example(text="data.path=interval(0,1)")
@pytest.mark.slow
def test_any_override_composes_or_is_refused_in_one_line(text, monkeypatch):
    """`overrides.check` composes at its end, by DVC's own composer."""
    monkeypatch.chdir(ROOT)
    for check in (check_composition, check_request):
        said = refusal(check, text) or ""
        assert said.isprintable(), repr(said)


def check_composition(text: str) -> None:
    overrides.check([text])


def check_request(text: str) -> None:
    """Check as for `dvc exp run --queue`, but for git and the queue."""
    asked = list(request.overrides_of([text]))
    for override in asked:
        request.check_form(override)
    request.check_files(asked)
