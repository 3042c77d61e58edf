"""An ONNX model, with an adapter or without, behind the API of lm-evaluation-harness.

    simple_evaluate(OnnxLM(Path("models/onnx"), adapter=Path("adapter.onnx_adapter")), tasks=["words"])

It cuts texts and splits them into tokens as the harness's own model for transformers does, so that figures of
both can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from stages.answers.generation import OnnxModel
from stages.answers.runtime import GRAPH, read_config
from stages.core.errors import UserError
from stages.text.chats import load_tokenizer

LONGEST = 2048  # tokens that are read at once, of a longer context too: logits fill memory
NEW_TOKENS = 256  # of an answer, where the task does not say
ADAPTER = "adapter"

Scored = tuple[float, bool]  # log p of a continuation, and whether it is the greedy one


def longest(folder: Path) -> int:
    """Return how many tokens of a text are read at once; the runtime wants room for one more."""
    return min(read_config(folder, GRAPH)["context_length"] - 1, LONGEST)


class OnnxLM(TemplateLM):
    """Log-likelihoods and greedy answers of an exported model."""

    def __init__(self, folder: Path, adapter: Path | None = None):
        super().__init__()
        self.model = OnnxModel(folder, {ADAPTER: adapter} if adapter else None)
        self.tokenizer = load_tokenizer(folder)
        self.max_length = longest(folder)
        self.shortened = (
            0  # contexts that were longer than what is read at once, and lost their beginning
        )
        self._adapter = ADAPTER if adapter else None
        self._folder = folder

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """What a cache of requests knows the tokenizer by."""
        return str(self._folder).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return a text's tokens; a mark of its beginning that stands in it is not written again."""
        if add_special_tokens is None:
            if not string.startswith(self.tokenizer.decode(self.prefix_token_id)):
                return self.tokenizer.encode(string)
            add_special_tokens = False
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as the model was trained to read it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[Scored]:
        """Score continuations; those of one context in a row share the reading of it."""
        found: list[Scored] = []
        bar = tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm)
        cut = ((self._cut(context, more), more) for _, context, more in requests)
        for context, members in groupby(cut, key=lambda pair: pair[0]):
            continuations = [more for _, more in members]
            found += self.model.score(context, continuations, self._adapter)
            bar.update(len(continuations))
        bar.close()
        return found

    def _cut(self, context: list[int], more: list[int]) -> list[int]:
        """Return as much of a context as fits before a continuation, whose last token is not read."""
        if len(more) > self.max_length:
            raise UserError(
                f"a continuation of {len(more)} tokens is longer than the {self.max_length} "
                "that are read at once: leave the task out"
            )
        return self._last(context, self.max_length + 1 - len(more))

    def _last(self, context: list[int], count: int) -> list[int]:
        """Return the last tokens of a context, and count it if that is not all of it."""
        self.shortened += len(context) > count
        return context[-count:]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log p of whole texts, in windows of `max_length` tokens."""
        return [
            sum(each for each, _ in self._loglikelihood_tokens(self._windows(*request.args), True))
            for request in tqdm(requests, desc="texts", disable=disable_tqdm)
        ]

    def _windows(self, text: str) -> list[tuple[tuple[str, str], list[int], list[int]]]:
        """Return a text as contexts and continuations that hold each of its tokens once."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(("", text), *make_disjoint_window(window)) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer greedily, up to the first of a task's stop texts."""
        return [
            self._answer(*request.args)
            for request in tqdm(requests, desc="answers", disable=disable_tqdm)
        ]

    def _answer(self, context: str, options: dict[str, Any]) -> str:
        """Answer one prompt. Raises `UserError` where a task wants tokens to be drawn."""
        options = normalize_gen_kwargs(options, NEW_TOKENS)
        if options.get("do_sample"):
            raise UserError("a task asks for sampling (do_sample): the ONNX model answers greedily")
        count, stops = options["max_gen_toks"], options["until"]
        prompt = self._last(self.tok_encode(context), self.max_length - count)
        text = ""
        for text in self._texts(prompt, count):
            if any(stop in text for stop in stops):
                break
        return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)]

    def _texts(self, prompt: list[int], count: int) -> Iterator[str]:
        """Yield the answer as far as it is, after every token but the one that ends it."""
        said: list[int] = []
        for token in self.model.stream(prompt, count, self._adapter):
            if token not in self.model.ends:
                said.append(token)
                yield self.tokenizer.decode(said, skip_special_tokens=True)
