"""Generate with ONNX Runtime GenAI: one base model, any number of named adapters.

    model = OnnxModel("models/onnx", {"travel": "models/onnx_adapter/adapter.onnx_adapter"})
    model.generate(tokens, adapter="travel", max_new_tokens=48)

Without adapters model.onnx runs, at full speed; with adapters its twin lora.onnx, on the same weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import psutil

from stages.answers.limits import Limits
from stages.core.errors import UserError
from stages.core.machine import usable_cores

if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
    onnxruntime.preload_dlls()  # CUDA's libraries lie in Python packages, where no loader looks

import onnxruntime_genai as og

if TYPE_CHECKING:
    from stages.answers.gpu_weights import Entry

GRAPH, LORA_GRAPH = "model.onnx", "lora.onnx"
# what the runtime says of files that were cut or edited; anything else is this machine's fault
DAMAGED = (
    "out of bounds|[Pp]arsing failed|JSON Error|failed to load external|[Nn]o such file|not exist"
)


def physical_cores() -> int:
    """Return the number of physical cores that this process may use.

    ONNX Runtime's own count reads the processor's topology, which virtual machines often hide: it
    then decodes on one core of two.
    """
    usable = usable_cores()
    return min(psutil.cpu_count(logical=False) or usable, usable)


def open_model(
    folder: Path, graph: str, shared: list[Entry] | None = None, captured: bool = False
) -> og.Model:
    """Load one of a folder's graphs.

    On a GPU with the weights that are shared there, and if `captured` with decoding as one CUDA graph, which
    answers single prompts only. Raises `UserError` where it cannot run on this machine.
    """
    options: dict[str, Any] = {"intra_op_num_threads": physical_cores()}
    decoder: dict[str, Any] = {"filename": graph, "session_options": options}
    if shared is not None:
        decoder["shared_initializers"] = shared
    if captured:  # a token launches hundreds of small kernels: captured, they are launched as one
        options["provider_options"] = [{"cuda": {"enable_cuda_graph": "1"}}]
    try:
        config = og.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": decoder}}))
        return og.Model(config)
    except Exception as error:  # noqa: BLE001  # the binding raises plain Exception
        reason = plain(error)
        if re.search(DAMAGED, reason):
            raise damaged(folder, reason) from None
        raise UserError(f"{folder} cannot run on this machine: {reason}") from None


def read_config(folder: Path, graph: str) -> dict[str, Any]:
    """Return what genai_config.json says of the model.

    Raises `UserError` for a folder that holds no such graph, links, or a file that was cut.
    """
    file = folder / "genai_config.json"
    if not file.is_file() or not (folder / graph).is_file():
        raise UserError(f"{folder} holds no ONNX model: run `dvc repro` or `dvc pull` first")
    refuse_links(folder)
    try:
        return json.loads(file.read_text(encoding="utf-8"))["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(folder, f"{file.name}: {error}") from None


def damaged(folder: Path, reason: str) -> UserError:
    """Return the error for files that were cut or edited."""
    return UserError(
        f"{folder} is damaged or incomplete ({reason}): `dvc checkout --force` brings DVC's files "
        "back, copy others again"
    )


def plain(error: Exception) -> str:
    """Return a message of ONNX Runtime in one line, without the places in its C++ source."""
    text = " ".join(str(error).split())
    return re.sub(r"\S+\.(cc|h|cpp):\d+ (\w+ )?", "", text).strip() or type(error).__name__


def refuse_links(folder: Path) -> None:
    """Raise `UserError` where files are links, as some values of DVC's cache.type make them."""
    for file in sorted(folder.iterdir()):
        if file.is_symlink() or (file.is_file() and file.stat().st_nlink > 1):
            raise UserError(
                f"{file} is a link, which ONNX Runtime refuses to read: "
                "`dvc config --local cache.type reflink,copy`, then `dvc checkout --relink`"
            )


def refuse_no_file(name: str, file: Path) -> None:
    """Raise `UserError` where an adapter's path names no file."""
    if not file.is_file():
        wrong = "is a folder: name the file in it" if file.is_dir() else "does not exist"
        raise UserError(f"adapter {name}: {file} {wrong}")


class OnnxModel:
    """An ONNX Runtime GenAI model with adapters loaded beside it; tokens in, tokens out, greedily."""

    def __init__(self, folder: str | Path, adapters: Mapping[str, str | Path] | None = None):
        folder = Path(folder)
        config = read_config(folder, LORA_GRAPH if adapters else GRAPH)
        self.context_length = config["context_length"]
        self._pad = config["pad_token_id"]
        self.limits = Limits.read(folder)
        ends = config["eos_token_id"]  # one, or several: any of them ends an answer
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        files = {name: Path(file) for name, file in (adapters or {}).items()}
        for name, file in files.items():
            refuse_no_file(name, file)
        self.folder = folder
        self._models: dict[Hashable, og.Model] = {}
        self._adapters: og.Adapters | None = None  # on the CPU
        self._shared: dict[str | None, list[Entry]] | None = None  # on a GPU, by adapter
        if "cuda" in json.dumps(config["decoder"]["session_options"]):
            self._share(files)
        else:
            self._open_on_cpu(files)
        for name, file in files.items():
            self._check_fits(name, file)

    def _open_on_cpu(self, files: dict[str, Path]) -> None:
        """One model for all adapters, which the runtime adds as inputs; without any, the faster graph."""
        model = open_model(self.folder, LORA_GRAPH if files else GRAPH)
        self._models[None] = model
        if not files:
            return
        self._adapters = og.Adapters(model)
        for name, file in files.items():
            self._load_on_cpu(self._adapters, name, file)

    def _load_on_cpu(self, adapters: og.Adapters, name: str, file: Path) -> None:
        try:
            adapters.load(str(file), name)
        except Exception:  # noqa: BLE001  # the binding raises plain Exception
            raise self._damaged(name, file) from None

    def _share(self, files: dict[str, Path]) -> None:
        """Say what a GPU has to hold for the base and for each adapter; models are opened when asked for."""
        import onnx_ir as ir  # like the next one, for a GPU alone

        from stages.answers.gpu_weights import base_weights

        try:
            self._shared = {None: base_weights(ir.load(self.folder / GRAPH).graph)}
            graph = ir.load(self.folder / LORA_GRAPH).graph if files else None
            weights = base_weights(graph) if files else []
        except Exception as error:  # noqa: BLE001  # what protobuf says of a file that was cut
            raise damaged(self.folder, plain(error)) from None
        for name, file in files.items():
            self._shared[name] = weights + self._tensors(name, file, graph)
        self._model(None, captured=True)

    def _tensors(self, name: str, file: Path, graph: Any) -> list[Entry]:
        """Return an adapter's tensors as a GPU gets them."""
        from stages.answers.gpu_weights import adapter_weights

        try:
            return adapter_weights(file, self.folder, graph)
        except UserError as error:
            raise self._misfit(name, file, str(error)) from None
        except Exception:  # noqa: BLE001  # the binding raises plain Exception
            raise self._damaged(name, file) from None

    def load(self, name: str, file: str | Path) -> None:
        """Load one more adapter; the model must have been opened with adapters."""
        file = Path(file)
        refuse_no_file(name, file)
        if self._shared is not None:
            import onnx_ir as ir

            from stages.answers.gpu_weights import base_weights

            graph = ir.load(self.folder / LORA_GRAPH).graph
            self._shared[name] = base_weights(graph) + self._tensors(name, file, graph)
        elif self._adapters is not None:
            self._load_on_cpu(self._adapters, name, file)
        else:
            raise ValueError("the model was opened without adapters")
        try:
            self._check_fits(name, file)
        except UserError:
            self.unload(name)
            raise

    def unload(self, name: str) -> None:
        """Forget an adapter, of which no generator may be left."""
        if self._shared is not None:
            del self._shared[name]
            for captured in (True, False):
                self._models.pop((name, captured), None)
        elif self._adapters is not None:
            self._adapters.unload(name)

    def _model(self, adapter: str | None, captured: bool) -> og.Model:
        """Return the model that answers with an adapter.

        On a GPU each has one for single prompts, whose steps are captured, and one for batches, which the
        runtime cannot capture; all of them on the same weights.
        """
        if self._shared is None:
            return self._models[None]
        if (adapter, captured) not in self._models:
            graph = GRAPH if adapter is None else LORA_GRAPH
            opened = open_model(self.folder, graph, self._shared[adapter], captured)
            self._models[adapter, captured] = opened
        return self._models[adapter, captured]

    @staticmethod
    def _damaged(name: str, file: Path) -> UserError:
        return UserError(
            f"adapter {name}: {file} is not an ONNX Runtime adapter, or is damaged: "
            "`lab adapt PEFT_DIR` makes one, `dvc checkout --force` brings ours back"
        )

    @staticmethod
    def _misfit(name: str, file: Path, why: str) -> UserError:
        return UserError(
            f"adapter {name}: {file} is not made for this model ({why}): "
            "convert it for this one with `lab adapt PEFT_DIR --model FOLDER`"
        )

    def _check_fits(self, name: str, file: Path) -> None:
        """Run one token: the runtime compares an adapter's shapes with the graph's inputs only then."""
        generator = self.generator(2, name)
        try:
            generator.append_tokens(np.array([[0]], dtype=np.int32))
        except Exception as error:  # noqa: BLE001  # the binding raises plain Exception
            raise self._misfit(name, file, plain(error)) from None

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
        model = self._model(adapter, captured=batch_size == 1)
        params = og.GeneratorParams(model)
        options: dict[str, Any] = {
            "max_length": max_length,
            "min_length": max_length if to_the_end else 0,
            "do_sample": False,
            "batch_size": batch_size,
        }
        params.set_search_options(**options | dict(search or {}))
        generator = og.Generator(model, params)
        if adapter is not None and self._adapters is not None:
            generator.set_active_adapter(self._adapters, adapter)
        return generator

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
            generator.append_tokens(np.array(texts, dtype=np.int32))
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
        """Return what `generate` does for every prompt, at once. All must have one number of tokens.

        The runtime takes a padding token at a prompt's end for padding, where prompts come in batches:
        with such a prompt among them they are answered one by one.
        """
        if any(prompt[-1:] == [self._pad] for prompt in prompts):
            return [self.generate(prompt, max_new_tokens, adapter) for prompt in prompts]
        steps = list(self._stream(prompts, max_new_tokens, adapter))
        return [self._cut([step[row] for step in steps]) for row in range(len(prompts))]

    def _cut(self, tokens: list[int]) -> list[int]:
        """Return an answer up to its first end token, which it includes."""
        ends = (place for place, token in enumerate(tokens, 1) if token in self.ends)
        return tokens[: next(ends, len(tokens))]

    def logits(self, tokens: list[int], adapter: str | None = None) -> np.ndarray:
        """Return the logits after every token, [tokens, vocabulary], float32."""
        return self._logits([tokens], adapter)[0]

    def _logits(self, rows: list[list[int]], adapter: str | None) -> np.ndarray:
        """Return the logits after every token of rows of one length, [rows, tokens, vocabulary]."""
        length = len(rows[0])
        self.check_lengths(length, 1)  # the runtime wants room for one token more
        generator = self.generator(length + 1, adapter, batch_size=len(rows))
        generator.append_tokens(np.array(rows, dtype=np.int32))
        return np.asarray(generator.get_output("logits"), dtype=np.float32)

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
        if self.limits.divide(lengths):
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


def surprise(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Return -log p of each token, [tokens], from the logits before it, [tokens, vocabulary]."""
    highest = logits.max(axis=-1)  # exp of a large logit overflows; of a difference it does not
    total = np.exp(logits - highest[:, None]).sum(axis=-1, dtype=np.float64)
    chosen = logits[np.arange(len(tokens)), tokens]
    return np.log(total) + (highest.astype(np.float64) - chosen)
