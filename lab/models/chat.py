"""Chat with the ONNX model and its adapter.

lab chat "what is the best thing to see in chicago"
lab chat                                             # interactive
lab chat --no-adapter "..."                          # the base model alone
lab chat --model models/merged "..."                 # what `lab merge` or `lab bake` made
lab chat --device webgpu "..."                       # on a GPU of any maker: docs/devices.md
lab chat --adapter travel=a.onnx_adapter --adapter food=b.onnx_adapter "..."    # side by side
"""

from __future__ import annotations

import io
import sys
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated

import typer

from lab.models.light_tokenizer import LightTokenizer
from lab.models.text_stream import TextStream
from stages.core.errors import UserError

if TYPE_CHECKING:
    from lab.engine.turns import End

TRAINED = "models/onnx_adapter/adapter.onnx_adapter"
DEFAULT = "adapter"
HELP = (
    "/use NAME changes the adapter, /base goes without, /new forgets the conversation, /quit ends"
)
Messages = list[dict[str, str]]
# options that `lab serve` has too
AdapterFiles = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATH", help="An adapter's file, repeatable [default: the trained one]."
    ),
]
NoAdapter = Annotated[bool, typer.Option("--no-adapter", help="The base model alone.")]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="cpu|cuda|webgpu",
        help="Where to compute [default: what the model was exported for].",
    ),
]
OnnxFolder = Annotated[Path, typer.Option(help="The ONNX model's folder.")]


def chat(
    question: Annotated[
        str | None, typer.Argument(help="Asked once; without it, interactive.")
    ] = None,
    adapter: AdapterFiles = None,
    no_adapter: NoAdapter = False,
    model: OnnxFolder = Path("models/onnx"),
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    device: Device = None,
) -> None:
    """Ask the ONNX model. With its adapter, without, or with several side by side."""
    if question is not None:
        check_question(question)
    for stream in (sys.stdout, sys.stderr):  # a terminal without emoji shows a ? instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    check_alternatives(adapter, no_adapter)
    if adapter and takes_none(model):
        raise UserError(
            f"{model} takes no adapter: `lab merge` or `lab bake` put one into it; "
            "leave --adapter out"
        )
    without = no_adapter or takes_none(model)
    adapters = {} if without else parse_adapters(adapter)
    opening: Messages = [{"role": "system", "content": system}] if system else []
    with closing(Speaker(model, adapters, device)) as onnx:
        if question is None:
            converse(onnx, list(adapters), opening, max_new_tokens)
        else:
            messages = [*opening, {"role": "user", "content": question}]
            ask(onnx, list(adapters), messages, max_new_tokens)


def check_alternatives(adapter: list[str] | None, no_adapter: bool) -> None:
    """Raise `UserError` for words that ask for adapters and for none."""
    if no_adapter and adapter:
        raise UserError(f"--no-adapter and --adapter {adapter[0]} exclude each other: give one")


def takes_none(model: Path) -> bool:
    """Say whether a folder has a model and no graph that takes an adapter: of `lab merge` or `lab bake`."""
    return (model / "model.onnx").is_file() and not (model / "lora.onnx").is_file()


def check_question(question: str) -> None:
    """Raise `UserError` for a question without a word in it, or in another encoding than UTF-8."""
    if not question.strip():
        raise UserError("the question is empty: there is nothing to answer")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError("the question is not UTF-8: set the terminal's encoding to it") from None


def parse_adapters(given: list[str] | None) -> dict[str, Path]:
    """Turn NAME=PATH words into a mapping; the trained adapter when none is given."""
    adapters = {}
    for word in given or [f"{DEFAULT}={TRAINED}"]:
        name, _, path = word.partition("=")
        if not (name and path):
            raise UserError(f"--adapter {word}: must be NAME=PATH, such as travel={TRAINED}")
        if name in adapters:
            raise UserError(f"--adapter {word}: {name} is given twice: choose another name")
        adapters[name] = Path(path)
    return adapters


class Speaker:
    """An ONNX model with the tokenizer and the chat template that training used."""

    def __init__(self, folder: Path, adapters: dict[str, Path], device: str | None = None):
        # imported here: a mistake in the words is told at once
        from lab.engine.models import Models
        from lab.engine.turns import Engine, Request
        from stages.text.chats import generation_prompt_ids

        self.prompt_ids, self.request = generation_prompt_ids, Request
        self.models = Models(folder, adapters, one_graph=True, device=device)
        self.tokenizer = LightTokenizer(folder)
        self.engine = Engine(self.models, slots=1)

    def close(self) -> None:
        """End the engine's thread: it must not answer any more when Python frees what it uses."""
        self.engine.close()

    def say(self, messages: Messages, adapter: str | None, max_new_tokens: int) -> str:
        """Stream the answer to the terminal and return it.

        Of a conversation only what is new is read. No adapter continues from another's keys and values.
        """
        prompt = self.prompt_ids(self.tokenizer, messages)
        used = None if adapter is None else self.models.adapters[adapter]
        events: SimpleQueue[int | End] = SimpleQueue()
        job = self.engine.submit(self.request(prompt, max_new_tokens, used), events.put)
        stream = TextStream(self.tokenizer)
        try:
            while isinstance(event := events.get(), int):
                if event not in self.models.base.ends:
                    show(stream.push(event))
        finally:
            job.cancel()
        show(stream.flush() + "\n")
        if event.error is not None:
            raise UserError(f"the model cannot answer: {event.error}")
        if event.reason == "length":
            print(f"(cut after {max_new_tokens} tokens: --max-new-tokens)", file=sys.stderr)
        return stream.text


def show(text: str) -> None:
    """Write to the terminal at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def ask(onnx: Speaker, names: list[str], messages: Messages, max_new_tokens: int) -> None:
    """Print the answer of every adapter, named where there are several, or of the base model."""
    adapters: list[str | None] = [*names] or [None]
    for name in adapters:
        if len(names) > 1:
            print(f"[{name}] ", end="")
        onnx.say(messages, name, max_new_tokens)


def converse(onnx: Speaker, names: list[str], opening: Messages, max_new_tokens: int) -> None:
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
    onnx: Speaker, messages: Messages, line: str, adapter: str | None, max_new_tokens: int
) -> Messages:
    """Answer the next line of a conversation; return the conversation with both."""
    asked = [*messages, {"role": "user", "content": line}]
    answer = onnx.say(asked, adapter, max_new_tokens)
    return [*asked, {"role": "assistant", "content": answer}]


def read_line(prompt: str) -> str | None:
    """Read a line from the user, None at the end of the input."""
    try:
        return input(prompt).strip()
    except EOFError:
        print()
        return None
