"""Chat: one question, several adapters, the base alone, a conversation; errors in one line."""

import json
from pathlib import Path

import pytest

from lab import chat
from stages.errors import UserError
from stages.generation import OnnxModel

ADAPTER = "models/onnx_adapter/adapter.onnx_adapter"


@pytest.fixture
def lab(finished):
    """Run `lab chat` in the finished clone; answers are short."""

    def run(*words: str, **options) -> str:
        return finished.python("lab.cli", "chat", "--max-new-tokens", "4", *words, **options)

    return run


def greedy_answer(folder: Path, question: str, adapter: str | None) -> str:
    """What the model says: 4 tokens, straight from the generator."""
    onnx = OnnxModel(folder / "models/onnx", {"adapter": folder / ADAPTER})
    prompt = onnx.tokenizer.apply_chat_template(
        json.dumps([{"role": "user", "content": question}]), add_generation_prompt=True
    )
    tokens = onnx.generate([int(token) for token in onnx.tokenizer.encode(prompt)], 4, adapter)
    return onnx.tokenizer.decode([token for token in tokens if token not in onnx.ends])


@pytest.mark.slow
def test_a_question_is_answered_with_the_adapter_and_without(lab, finished):
    question = "where is Chicago?"
    assert lab(question) == greedy_answer(finished.root, question, "adapter") + "\n"
    assert lab("--no-adapter", question) == greedy_answer(finished.root, question, None) + "\n"


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
            "lab: --adapter no-path: must be one of adapter, or NAME=PATH",
        ),
        (("--adapter", "x=nowhere", "hi"), "lab: adapter x: nowhere does not exist"),
        (("--model", "nowhere", "hi"), "lab: nowhere holds no ONNX model"),
    ],
)
def test_a_mistake_ends_in_one_line(lab, words, message):
    output = lab(*words, exits=1)
    assert output.startswith(message)
    assert len(output.splitlines()) == 1


def test_a_conversation_longer_than_the_context_is_followed_by_a_new_one(monkeypatch, capsys):
    """The model is made up: it answers how many messages it got, and has a context of three."""

    def say(_, messages, *__):
        if len(messages) > 3:
            raise UserError("the model's context is 3 messages")
        return f"{len(messages)}"

    heard = []
    monkeypatch.setattr(chat, "say", lambda *words: heard.append(say(*words)) or heard[-1])
    lines = iter(["one", "three", "five", "one", "/quit"])
    monkeypatch.setattr(chat, "read_line", lambda _: next(lines))
    chat.converse(None, [], [], 4)
    assert heard == ["1", "3", "1"]
    assert (
        "the model's context is 3 messages\nThis is a new conversation" in capsys.readouterr().out
    )
