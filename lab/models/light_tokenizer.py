"""A model's tokenizer and chat template without transformers and torch, whose imports take seconds.

    tokenizer = LightTokenizer("models/onnx")
    tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)

It has those methods of transformers' tokenizers that stages.text.chats calls, and gives the same ids and
texts: the tokens by the same Rust library from the same tokenizer.json, the template by the same sandbox of
Jinja.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Template, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class LightTokenizer:
    """The tokenizer of an exported model's folder. Raises `UserError` if a file is missing or broken."""

    def __init__(self, folder: str | Path):
        from tokenizers import Tokenizer

        folder = Path(folder)
        try:
            self.backend_tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except Exception as error:  # noqa: BLE001  # the Rust library raises plain Exception
            reason = " ".join(str(error).split())
            raise UserError(f"{folder}: the tokenizer cannot be read: {reason}") from None
        self.special_tokens_map = {
            name: text_of(settings[name]) for name in NAMED if settings.get(name) is not None
        }
        self.chat_template = template_of(folder, settings)
        self._compiled: dict[str, Template] = {}

    @property
    def eos_token_id(self) -> int | None:
        """Return the token that ends a text, None if the tokenizer has none."""
        return self.backend_tokenizer.token_to_id(self.special_tokens_map.get("eos_token", ""))

    def decode(self, tokens: list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        """Return the text of tokens; nothing is cleaned up."""
        return self.backend_tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
    ) -> str:
        """Return the text of messages in a chat template, by default the model's own."""
        if tokenize:
            raise NotImplementedError("stages.text.chats encodes the text itself")
        template = chat_template or self.chat_template or ""
        if template not in self._compiled:
            self._compiled[template] = compiled(template)
        return self._compiled[template].render(
            messages=[{k: v for k, v in each.items() if v is not None} for each in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens_map,
        )


def text_of(token: str | dict[str, Any]) -> str:
    """Return a token's text, which older files keep in a mapping."""
    return token["content"] if isinstance(token, dict) else token


def template_of(folder: Path, settings: dict[str, Any]) -> str | None:
    """Return the chat template: the file's, or the settings' (of several, the one called default)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        return {each["name"]: each["template"] for each in found}.get("default")
    return found


def compiled(template: str) -> Template:
    """Compile a chat template in the environment that transformers promises to its authors."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter would escape < and >
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, generation_tag()]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # noqa: DTZ005  # the user's own day
    return environment.from_string(template)


def generation_tag() -> type[Extension]:
    """Return the extension for {% generation %}, which marks answers and renders what is in it."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation
