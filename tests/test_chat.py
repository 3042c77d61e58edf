"""Chat: one question, several adapters, the base alone, a conversation; errors in one line."""

from pathlib import Path

import pytest

from lab.models import chat
from lab.models.text_stream import TextStream
from stages.answers.generation import OnnxModel
from stages.core.errors import UserError
from stages.sources import random_model
from stages.text.chats import generation_prompt_ids, load_tokenizer
from support.project import ROOT

ADAPTER = "models/onnx_adapter/adapter.onnx_adapter"


@pytest.fixture
def lab(finished):
    """Run `lab chat` in the finished clone; answers are short."""

    def run(*words: str, **options) -> str:
        return finished.python("lab.cli", "chat", "--max-new-tokens", "4", *words, **options)

    return run


def greedy_answer(folder: Path, question: str, adapter: str | None) -> str:
    """What the model says: 4 tokens, straight from the generator."""
    onnx = OnnxModel(folder / "models/onnx", {"adapter": folder / ADAPTER} if adapter else None)
    tokenizer = load_tokenizer(folder / "models/onnx")
    prompt = generation_prompt_ids(tokenizer, [{"role": "user", "content": question}])
    tokens = onnx.generate(prompt, 4, adapter)
    cut = "" if tokens[-1] in onnx.ends else "(cut after 4 tokens: --max-new-tokens)\n"
    return tokenizer.decode(tokens, skip_special_tokens=True) + "\n" + cut


@pytest.mark.slow
def test_a_question_is_answered_with_the_adapter_and_without(lab, finished):
    question = "where is Chicago?"
    assert lab(question) == greedy_answer(finished.root, question, "adapter")
    assert lab("--no-adapter", question) == greedy_answer(finished.root, question, None)


@pytest.mark.slow
def test_several_adapters_answer_side_by_side(lab):
    output = lab("--adapter", f"one={ADAPTER}", "--adapter", f"two={ADAPTER}", "where is Chicago?")
    assert [line[:5] for line in output.splitlines() if line.startswith("[")] == ["[one]", "[two]"]


@pytest.mark.slow
def test_a_conversation_takes_commands_until_it_ends(lab):
    output = lab(says="hello\n/base\nhello\n/what\n/quit\n")
    assert "adapter> " in output
    assert "base> " in output
    assert output.count("/use NAME") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--adapter", "no-path", "hi"),
            "lab: --adapter no-path: must be NAME=PATH, such as travel=",
        ),
        (("--adapter", "x=nowhere", "hi"), "lab: adapter x: nowhere does not exist"),
        (("--adapter", "x=a", "--adapter", "x=b", "hi"), "lab: --adapter x=b: x is given twice"),
        (("--adapter", "x=a", "--no-adapter", "hi"), "lab: --no-adapter and --adapter x=a exclude"),
        (("--model", "nowhere", "hi"), "lab: nowhere holds no ONNX model"),
    ],
)
def test_a_mistake_ends_in_one_line(lab, words, message):
    output = lab(*words, exits=1)
    assert output.startswith(message)
    assert len(output.splitlines()) == 1


class Echo:
    """Stands for a model: it answers how many messages it got, and has a context of three."""

    def __init__(self):
        self.heard = []

    def say(self, messages, *_):
        if len(messages) > 3:
            raise UserError("the model's context is 3 messages")
        self.heard.append(f"{len(messages)}")
        return self.heard[-1]


def test_a_conversation_longer_than_the_context_is_followed_by_a_new_one(monkeypatch, capsys):
    lines, echo = iter(["one", "three", "five", "one", "/quit"]), Echo()
    monkeypatch.setattr(chat, "read_line", lambda _: next(lines))
    chat.converse(echo, [], [], 4)
    assert echo.heard == ["1", "3", "1"]
    assert (
        "the model's context is 3 messages\nThis is a new conversation" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("question", "message"),
    [("", "is empty"), (" \n\t", "is empty"), ("caf\udce9", "is not UTF-8")],
)
def test_a_question_that_says_nothing_or_cannot_be_read_is_refused(question, message):
    with pytest.raises(UserError, match=message):
        chat.check_question(question)


@pytest.fixture(scope="module")
def tokenizer():
    return random_model.train_tokenizer(ROOT / "data/travel.jsonl", 400)


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "👩‍👩‍👧‍👦 emoji 🇨🇭",
        "漢字 かな カナ",
        "e\u0301 combined a\u0308",
        "  spaces\n\tand tabs ",
    ],
)
def test_a_streamed_answer_is_the_whole_answers_text_and_no_piece_comes_twice(tokenizer, text):
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join([*pieces, stream.flush()]) == text == stream.text
    assert stream.flush() == ""


def test_an_answer_cut_inside_a_character_shows_that_it_was(tokenizer):
    tokens = tokenizer("漢", add_special_tokens=False).input_ids
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in tokens[:-1]) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
