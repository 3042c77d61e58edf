"""Generate with ONNX Runtime GenAI: one base model, any number of named adapters.

    model = OnnxModel("models/onnx", {"travel": "models/onnx_adapter/adapter.onnx_adapter"})
    model.generate(tokens, adapter="travel", max_new_tokens=48)

Without adapters model.onnx runs, at full speed; with adapters a twin of it, on the same weights: lora_op.onnx
with the operator of stages/lora_op, or lora.onnx where that cannot be compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stages.adapters.names import LORA_GRAPH
from stages.answers.devices import choose, explained, in_software, need
from stages.answers.held_adapters import hold_adapters, misfit, refuse_no_file, say_once
from stages.answers.limits import Limits
from stages.answers.runtime import GRAPH, og, plain, read_config
from stages.core.errors import UserError

# For fewer than 32 tokens at once ONNX Runtime's WebGPU attention has one kernel, for more one that counts
# on how many threads a GPU runs together: on some it gives other numbers (onnxruntime#26064, #28520), and on
# SwiftShader. An even number, as the engine's pieces.
SURE = 30
PROBE = 80  # tokens: more than that kernel's tiles
OTHER_NUMBERS = 0.2  # standard deviations of the logits; rounding to int8 makes 0.06


class OnnxModel:
    """An ONNX Runtime GenAI model with adapters loaded beside it; tokens in, tokens out, greedily."""

    def __init__(
        self,
        folder: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        device: str | None = None,
    ):
        folder = Path(folder)
        config = read_config(folder, LORA_GRAPH if adapters else GRAPH)
        self.context_length = config["context_length"]
        self._pad, self._vocabulary = config["pad_token_id"], config["vocab_size"]
        self.limits = Limits.read(folder)
        ends = config["eos_token_id"]  # one, or several: any of them ends an answer
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        files = {name: Path(file) for name, file in (adapters or {}).items()}
        for name, file in files.items():
            refuse_no_file(name, file)
        device = choose(config, device)
        need(device)
        self._most: int | None = None  # tokens that are read at once
        self._adapters = hold_adapters(folder, files, device)
        if device == "webgpu":
            self._check_runs(folder)
            if in_software() or self._reads_otherwise():
                self._most = SURE
                say_once(f"prompts are read {SURE} tokens at a time: docs/devices.md")
        for name, file in files.items():
            self._check_fits(name, file)

    def load(self, name: str, file: str | Path) -> None:
        """Load one more adapter; the model must have been opened with adapters."""
        file = Path(file)
        refuse_no_file(name, file)
        self._adapters.add(name, file)
        try:
            self._check_fits(name, file)
        except UserError:
            self.unload(name)
            raise

    def unload(self, name: str) -> None:
        """Forget an adapter, of which no generator may be left."""
        self._adapters.remove(name)

    def _check_runs(self, folder: Path) -> None:
        """Run one token: WebGPU compiles its kernels, and finds out what the GPU lacks, only then."""
        try:
            self._run_one(None)
        except Exception as error:  # noqa: BLE001  # the binding raises plain Exception
            reason = explained(plain(error))
            raise UserError(f"{folder} cannot run on this machine: {reason}") from None

    def _reads_otherwise(self) -> bool:
        """Say whether many tokens that are read at once are read otherwise than piece by piece."""
        count = min(PROBE, self.context_length - 1)
        tokens = np.random.default_rng(0).integers(0, self._vocabulary, count).tolist()
        at_once = self.logits(tokens)[-1]
        self._most = SURE
        wanted = self.logits(tokens)[-1]
        self._most = None
        return not (at_once - wanted).std() <= OTHER_NUMBERS * wanted.std()  # NaN is not, either

    def _run_one(self, adapter: str | None) -> None:
        """Read one token."""
        self.generator(2, adapter).append_tokens(np.array([[0]], dtype=np.int32))

    def _check_fits(self, name: str, file: Path) -> None:
        """Run one token: the runtime compares an adapter's shapes with the graph's inputs only then."""
        try:
            self._run_one(name)
        except Exception as error:  # noqa: BLE001  # the binding raises plain Exception
            raise misfit(name, file, plain(error)) from None

    def generator(
        self,
        max_length: int,
        adapter: str | None = None,
        to_the_end: bool = False,
        batch_size: int = 1,
        search: Mapping[str, Any] | None = None,
    ) -> og.Generator:
        """Return a generator for sequences of at most `max_length` tokens, or exactly as many.

        It is greedy unless `search` has other options of the runtime. The cache for keys and values is as
        large as `max_length`, whatever the model's context.
        """
        model = self._adapters.model(adapter, captured=batch_size == 1)
        params = og.GeneratorParams(model)
        options: dict[str, Any] = {
            "max_length": max_length,
            "min_length": max_length if to_the_end else 0,
            "do_sample": False,
            "batch_size": batch_size,
        }
        params.set_search_options(**options | dict(search or {}))
        generator = og.Generator(model, params)
        self._adapters.activate(generator, adapter)
        return generator

    def pieces(self, rows: list[list[int]]) -> Iterator[np.ndarray]:
        """Yield the tokens of rows of one length, [rows, tokens], as a generator may be given them.

        Raises `UserError` for a longrope text that must be read at once and cannot be.
        """
        length = len(rows[0])
        most = self._most or length
        switch = self.limits.rope_switch
        if switch is not None and length > max(most, switch):
            raise UserError(
                f"more than {switch} tokens of this model (longrope) must be read at once, and this GPU "
                f"reads {most} at a time: ask for less, or --device cpu"
            )
        for start in range(0, length, most):
            yield np.array([row[start : start + most] for row in rows], dtype=np.int32)

    def _one_by_one(self, rows: list[list[int]]) -> bool:
        """Say whether rows are too long to be read together: the runtime takes a batch at once."""
        return self._most is not None and len(rows) > 1 and max(map(len, rows)) > self._most

    def check_lengths(self, prompt: int, answer: int) -> None:
        """Raise `UserError` for numbers of tokens that the model cannot take."""
        if prompt == 0:
            raise UserError("the prompt is empty: there is nothing to answer")
        if prompt + answer > self.context_length:
            raise UserError(
                f"a prompt of {prompt} tokens and an answer of up to {answer} do not fit into the "
                f"model's context of {self.context_length}: shorten one of them"
            )

    def stream(
        self, prompt: list[int], max_new_tokens: int, adapter: str | None = None
    ) -> Iterator[int]:
        """Yield the answer's tokens one by one, the token that ends it included."""
        for tokens in self._stream([prompt], max_new_tokens, adapter):
            yield tokens[0]
            if tokens[0] in self.ends:
                return

    def _stream(
        self, prompts: list[list[int]], max_new_tokens: int, adapter: str | None
    ) -> Iterator[list[int]]:
        """Yield the next token of every answer until all have ended."""
        self.check_lengths(len(prompts[0]), max_new_tokens)
        texts = [list(prompt) for prompt in prompts]
        ended: set[int] = set()
        for length in self.limits.stretches(len(prompts[0]), max_new_tokens):
            generator = self.generator(length, adapter, batch_size=len(prompts))
            for piece in self.pieces(texts):
                generator.append_tokens(piece)
            while len(texts[0]) < length and len(ended) < len(texts):
                generator.generate_next_token()
                tokens = [int(token) for token in generator.get_next_tokens()]
                for row, token in enumerate(tokens):
                    texts[row].append(token)
                ended |= {row for row, token in enumerate(tokens) if token in self.ends}
                yield tokens

    def generate(
        self, prompt: list[int], max_new_tokens: int, adapter: str | None = None
    ) -> list[int]:
        """Return the answer's tokens, the token that ends it included where it came in time."""
        return list(self.stream(prompt, max_new_tokens, adapter))

    def generate_many(
        self, prompts: list[list[int]], max_new_tokens: int, adapter: str | None = None
    ) -> list[list[int]]:
        """Return an answer to every prompt, at once. All must have one number of tokens.

        Products of several rows are summed in another order than those of one: where two tokens are about as
        likely, an answer can go on otherwise than `generate` lets it.

        The runtime takes a padding token at a prompt's end for padding, where prompts come in batches:
        with such a prompt among them they are answered one by one.
        """
        if self._one_by_one(prompts) or any(prompt[-1:] == [self._pad] for prompt in prompts):
            return [self.generate(prompt, max_new_tokens, adapter) for prompt in prompts]
        steps = list(self._stream(prompts, max_new_tokens, adapter))
        return [self._cut([step[row] for step in steps]) for row in range(len(prompts))]

    def _cut(self, tokens: list[int]) -> list[int]:
        """Return an answer up to its first end token, which it includes."""
        ends = (place for place, token in enumerate(tokens, 1) if token in self.ends)
        return tokens[: next(ends, len(tokens))]

    def examine(
        self,
        prompts: list[list[int]],
        references: list[list[int]],
        max_new_tokens: int,
        adapter: str | None = None,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield, for every prompt, the greedy answer and -log p of every token of its reference answer.

        Each text is read once: what all prompts begin with is kept from one to the next, and the reference
        is read behind the prompt. As far as its tokens are the likeliest ones, they are the greedy answer,
        and only what comes after them is generated, token by token, as an application does.
        """
        if self.limits.rope_switch is not None:  # the keys of a longer text are turned otherwise
            for prompt, reference in zip(prompts, references, strict=True):
                answer = self.generate(prompt, max_new_tokens, adapter)
                yield answer, self.negative_log_likelihood(prompt, reference, adapter)
            return
        read = self._read_behind(prompts, references, max_new_tokens, adapter)
        for (generator, logits), prompt, reference in zip(read, prompts, references, strict=True):
            likelihoods = surprise(logits, reference)
            yield self._greedy(generator, prompt, reference, logits, max_new_tokens), likelihoods

    def score(
        self, prompt: list[int], continuations: list[list[int]], adapter: str | None = None
    ) -> list[tuple[float, bool]]:
        """Return log p of every continuation of a prompt, and whether it is the greedy one."""
        if self.limits.rope_switch is not None:
            rows = [self.logits((prompt + more)[:-1], adapter) for more in continuations]
            read = [row[len(prompt) - 1 :] for row in rows]
        else:
            prompts = [prompt] * len(continuations)
            read = [logits for _, logits in self._read_behind(prompts, continuations, 0, adapter)]
        return [
            (-float(surprise(logits, more).sum()), logits.argmax(axis=-1).tolist() == more)
            for logits, more in zip(read, continuations, strict=True)
        ]

    def _read_behind(
        self,
        prompts: list[list[int]],
        references: list[list[int]],
        max_new_tokens: int,
        adapter: str | None,
    ) -> Iterator[tuple[og.Generator, np.ndarray]]:
        """Yield, for every prompt, its generator and the logits before each token of its reference.

        It is one generator for all, which has room for an answer and reads what all begin with once.
        """
        rooms = [max(len(reference), max_new_tokens) for reference in references]
        for prompt, room in zip(prompts, rooms, strict=True):
            self.check_lengths(len(prompt), room)
        opening = shared_opening(prompts)
        longest = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
        generator = self.generator(longest, adapter)
        if opening:
            self._read(generator, [prompts[0][:opening]])
        for prompt, reference in zip(prompts, references, strict=True):
            if generator.token_count() != opening:
                generator.rewind_to(opening)
            logits = self._read(generator, [prompt[opening:] + reference[:-1]])[0]
            yield generator, logits[len(prompt) - 1 - opening :]

    def _greedy(
        self,
        generator: og.Generator,
        prompt: list[int],
        reference: list[int],
        logits: np.ndarray,
        max_new_tokens: int,
    ) -> list[int]:
        """Return the greedy answer, the reference having been read behind the prompt.

        Up to the first token that is not the likeliest, the reference is the answer.
        """
        likeliest = logits.argmax(axis=-1).tolist()
        alike = agreement(reference, likeliest)
        answer = self._cut(likeliest[: alike + 1])[:max_new_tokens]
        if answer[-1] in self.ends or len(answer) == max_new_tokens:
            return answer
        generator.rewind_to(len(prompt) + len(answer) - 1)
        generator.append_tokens(np.array([answer[-1:]], dtype=np.int32))
        while len(answer) < max_new_tokens and answer[-1] not in self.ends:
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
        return answer

    def logits(self, tokens: list[int], adapter: str | None = None) -> np.ndarray:
        """Return the logits after every token, [tokens, vocabulary], float32."""
        return self._logits([tokens], adapter)[0]

    def _logits(self, rows: list[list[int]], adapter: str | None) -> np.ndarray:
        """Return the logits after every token of rows of one length, [rows, tokens, vocabulary]."""
        length = len(rows[0])
        self.check_lengths(length, 1)  # the runtime wants room for one token more
        return self._read(self.generator(length + 1, adapter, batch_size=len(rows)), rows)

    def _read(self, generator: og.Generator, rows: list[list[int]]) -> np.ndarray:
        """Let a generator read rows of one length; return the logits after every token of them."""
        found = []
        for piece in self.pieces(rows):
            generator.append_tokens(piece)
            found.append(np.array(generator.get_output("logits"), dtype=np.float32))
        return np.concatenate(found, axis=1)

    def negative_log_likelihood(
        self, prompt: list[int], answer: list[int], adapter: str | None = None
    ) -> np.ndarray:
        """Return -log p of every token of the answer after the prompt, [answer]."""
        return self.negative_log_likelihoods([prompt], [answer], adapter)[0]

    def negative_log_likelihoods(
        self, prompts: list[list[int]], answers: list[list[int]], adapter: str | None = None
    ) -> list[np.ndarray]:
        """Return what `negative_log_likelihood` does for every answer, at once; lengths may differ.

        The last token of a row only costs time, no token is judged by what comes after it: it is left out.
        Shorter rows are filled up with any token but the padding one, which the runtime treats differently.
        Rows on both sides of a longrope switch are read one by one: a batch is turned as its longest row is.
        """
        lengths = [len(p) + len(a) - 1 for p, a in zip(prompts, answers, strict=True)]
        if self.limits.divide(lengths) or self._one_by_one(
            [p + a for p, a in zip(prompts, answers, strict=True)]
        ):
            pairs = zip(prompts, answers, strict=True)
            return [self.negative_log_likelihood(p, a, adapter) for p, a in pairs]
        rows = [(p + a)[:-1] for p, a in zip(prompts, answers, strict=True)]
        longest = max(map(len, rows))
        filler = int(self._pad == 0)  # 0, or 1 where 0 is the padding token
        if any(row[-1] == self._pad for row in rows):
            longest += 1  # so that no row ends with the padding token, which would be masked away
        logits = self._logits([row + [filler] * (longest - len(row)) for row in rows], adapter)
        return [
            surprise(row[len(prompt) - 1 :][: len(answer)], answer)
            for row, prompt, answer in zip(logits, prompts, answers, strict=True)
        ]


def agreement(text: list[int], greedy: list[int]) -> int:
    """Return how many tokens a text begins with that are also the likeliest."""
    pairs = enumerate(zip(text, greedy, strict=True))
    return next((place for place, (token, likeliest) in pairs if token != likeliest), len(text))


def shared_opening(prompts: list[list[int]]) -> int:
    """Return how many tokens all prompts begin with, an even number, and not the whole of any.

    Kernels take two tokens at a time: behind an odd number each would stand in another pair.
    """
    alike = 0
    for tokens in zip(*prompts, strict=False):
        if len(set(tokens)) > 1:
            break
        alike += 1
    alike = min(alike, min(map(len, prompts)) - 1)
    return alike - alike % 2


def surprise(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Return -log p of each token, [tokens], from the logits before it, [tokens, vocabulary]."""
    highest = logits.max(axis=-1)  # exp of a large logit overflows; of a difference it does not
    total = np.exp(logits - highest[:, None]).sum(axis=-1, dtype=np.float64)
    chosen = logits[np.arange(len(tokens)), tokens]
    return np.log(total) + (highest.astype(np.float64) - chosen)
