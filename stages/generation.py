"""Generate with ONNX Runtime GenAI: one base model, any number of named adapters.

model = OnnxModel("models/onnx", {"travel": "models/onnx_adapter/adapter.onnx_adapter"})
model.generate(tokens, adapter="travel", max_new_tokens=48)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import psutil

from stages.errors import UserError

if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
    onnxruntime.preload_dlls()  # CUDA's libraries lie in Python packages, where no loader looks

import onnxruntime_genai as og


def with_every_core(folder: Path) -> og.Config:
    """Return the model's configuration with a thread for every physical core that this process may use.

    ONNX Runtime's own count reads the processor's topology, which virtual machines often hide: it
    then decodes on one core of two.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = min(psutil.cpu_count(logical=False) or usable, usable)
    config = og.Config(str(folder))
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    return config


class OnnxModel:
    """An ONNX Runtime GenAI model with adapters loaded beside it; tokens in, tokens out, greedily."""

    def __init__(self, folder: str | Path, adapters: Mapping[str, str | Path] | None = None):
        folder = Path(folder)
        if not (folder / "genai_config.json").is_file():
            raise UserError(f"{folder} holds no ONNX model: run `dvc repro` or `dvc pull` first")
        try:
            self.model = og.Model(with_every_core(folder))
        except Exception as error:  # the binding raises plain Exception
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder} cannot run on this machine: {reason}") from None
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        self.context_length = config["model"]["context_length"]
        self.tokenizer = og.Tokenizer(self.model)
        self.ends = {int(token) for token in self.tokenizer.eos_token_ids}
        self._adapters = og.Adapters(self.model)
        for name, file in (adapters or {}).items():
            self._load(name, Path(file))

    def _load(self, name: str, file: Path) -> None:
        if not file.is_file():
            raise UserError(f"adapter {name}: {file} does not exist")
        try:
            self._adapters.load(str(file), name)
        except Exception as error:  # the binding raises plain Exception
            raise UserError(f"adapter {name}: {file} cannot be loaded: {error}") from None

    def generator(
        self, max_length: int, adapter: str | None = None, to_the_end: bool = False
    ) -> og.Generator:
        """Return a greedy generator for one sequence of at most `max_length` tokens, or exactly as many."""
        if max_length > self.context_length:
            raise UserError(
                f"{max_length} tokens of prompt and answer do not fit into the model's context of "
                f"{self.context_length}"
            )
        params = og.GeneratorParams(self.model)
        params.set_search_options(
            max_length=max_length,
            min_length=max_length if to_the_end else 0,
            do_sample=False,
            batch_size=1,
        )
        generator = og.Generator(self.model, params)
        if adapter is not None:
            generator.set_active_adapter(self._adapters, adapter)
        return generator

    def stream(
        self, prompt: list[int], max_new_tokens: int, adapter: str | None = None
    ) -> Iterator[int]:
        """Yield the answer's tokens one by one, the token that ends it included."""
        generator = self.generator(len(prompt) + max_new_tokens, adapter)
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        for _ in range(max_new_tokens):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            yield token
            if token in self.ends or generator.is_done():
                return

    def generate(
        self, prompt: list[int], max_new_tokens: int, adapter: str | None = None
    ) -> list[int]:
        """Return the answer's tokens, the token that ends it included where it came in time."""
        return list(self.stream(prompt, max_new_tokens, adapter))

    def logits(self, tokens: list[int], adapter: str | None = None) -> np.ndarray:
        """Return the logits after every token, [tokens, vocabulary], float32."""
        generator = self.generator(len(tokens) + 1, adapter)
        generator.append_tokens(np.array([tokens], dtype=np.int32))
        return np.asarray(generator.get_output("logits"), dtype=np.float32)[0]

    def negative_log_likelihood(
        self, prompt: list[int], answer: list[int], adapter: str | None = None
    ) -> np.ndarray:
        """Return -log p of every token of the answer after the prompt, [answer]."""
        logits = self.logits(prompt + answer, adapter)[len(prompt) - 1 : -1].astype(np.float64)
        highest = logits.max(axis=-1)
        normalizer = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))
        return normalizer - logits[np.arange(len(answer)), answer]
