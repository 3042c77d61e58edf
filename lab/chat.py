"""Chat with the ONNX model and its adapters.

lab chat "what is the best thing to see in chicago"
lab chat                                             # interactive
lab chat --no-adapter "..."                          # the base model alone
lab chat --adapter small "..."                       # one of conf/adapters; several answer side by side
lab chat --adapter travel=a.onnx_adapter --adapter food=b.onnx_adapter "..."
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from stages.errors import UserError
from stages.generation import OnnxModel
from stages.places import place
from stages.settings import PARAMS, load

TRAINED = "models/onnx_adapter/adapter.onnx_adapter"
DEFAULT = "adapter"
HELP = (
    "/use NAME changes the adapter, /base goes without, /new forgets the conversation, /quit ends"
)
Messages = list[dict[str, str]]


def chat(
    question: Annotated[
        str | None, typer.Argument(help="Asked once; without it, interactive.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|NAME=PATH",
            help="An adapter of conf/adapters, or a file; repeatable [default: the trained ones].",
        ),
    ] = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="The base model alone.")] = False,
    model: Annotated[Path, typer.Option(help="The ONNX model's folder.")] = Path("models/onnx"),
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
) -> None:
    """Ask the ONNX model, with its adapter, without, or with several side by side."""
    adapters = {} if no_adapter else parse_adapters(adapter)
    onnx = OnnxModel(model, adapters)
    opening: Messages = [{"role": "system", "content": system}] if system else []
    if question is None:
        converse(onnx, list(adapters), opening, max_new_tokens)
    else:
        messages = [*opening, {"role": "user", "content": question}]
        ask(onnx, list(adapters), messages, max_new_tokens)


def parse_adapters(given: list[str] | None) -> dict[str, Path]:
    """Turn NAME and NAME=PATH words into a mapping; all trained adapters when none is given."""
    trained = trained_adapters()
    adapters = {}
    for word in given or trained:
        name, separator, path = word.partition("=")
        if not (name and path if separator else name in trained):
            raise UserError(
                f"--adapter {word}: must be one of {', '.join(trained)}, "
                f"or NAME=PATH, such as travel={TRAINED}"
            )
        adapters[name] = Path(path) if separator else trained[name]
    return adapters


def trained_adapters() -> dict[str, Path]:
    """Return where the pipeline puts every adapter: the default one, and those of conf/adapters."""
    named = load().adapters if PARAMS.is_file() else {}
    return {DEFAULT: Path(TRAINED), **{name: place(TRAINED, name) for name in named}}


def ask(onnx: OnnxModel, names: list[str], messages: Messages, max_new_tokens: int) -> None:
    """Print the answer of every adapter, named where there are several, or of the base model."""
    for name in names or [None]:
        if len(names) > 1:
            print(f"[{name}] ", end="")
        say(onnx, messages, name, max_new_tokens)


def converse(onnx: OnnxModel, names: list[str], opening: Messages, max_new_tokens: int) -> None:
    """Hold a conversation until /quit or the end of the input."""
    active = names[0] if names else None
    messages = list(opening)
    print(f"Adapters: {', '.join(names) or 'none'}. {HELP}.")
    while (line := read_line(f"{active or 'base'}> ")) not in (None, "/quit"):
        command, _, argument = line.partition(" ")
        if command == "/base":
            active = None
        elif command == "/use" and argument in names:
            active = argument
        elif command == "/new":
            messages = list(opening)
        elif line.startswith("/"):
            print(f"{HELP}. Adapters: {', '.join(names) or 'none'}.")
        elif line.strip():
            try:
                messages = reply(onnx, messages, line, active, max_new_tokens)
            except UserError as error:  # the conversation is longer than the model's context
                print(f"{error}\nThis is a new conversation: ask again.")
                messages = list(opening)


def reply(
    onnx: OnnxModel, messages: Messages, line: str, adapter: str | None, max_new_tokens: int
) -> Messages:
    """Answer the next line of a conversation; return the conversation with both."""
    asked = [*messages, {"role": "user", "content": line}]
    answer = say(onnx, asked, adapter, max_new_tokens)
    return [*asked, {"role": "assistant", "content": answer}]


def read_line(prompt: str) -> str | None:
    """Read a line from the user, None at the end of the input."""
    try:
        return input(prompt).strip()
    except EOFError:
        print()
        return None


def say(onnx: OnnxModel, messages: Messages, adapter: str | None, max_new_tokens: int) -> str:
    """Stream the model's answer to the terminal and return it."""
    template = onnx.tokenizer.apply_chat_template
    prompt = template(json.dumps(messages), add_generation_prompt=True)
    tokens = [int(token) for token in onnx.tokenizer.encode(prompt)]
    decoder, answer = onnx.tokenizer.create_stream(), ""
    for token in onnx.stream(tokens, max_new_tokens, adapter):
        if token not in onnx.ends:
            piece = decoder.decode(token)
            answer += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    print()
    return answer
