"""Decoding on an NVIDIA GPU with an adapter: by our operator, as weights of a graph, as GenAI's own adapters.

python -m benchmarks.gpu_adapters          # after dvc repro with optimize=cuda_int4; a minute

Writes benchmarks/results/gpu_adapters.json: tokens/s of the median step after a prompt of 16 tokens, batch 1;
milliseconds for a prompt of 1,000; GPU memory; how far logits are off those of GenAI's own adapters, in
standard deviations; whether generators in turn keep their own adapter; and what the kernels of a step take.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.gpu_kernels import kernels
from benchmarks.machine import keep
from stages.adapters.names import LORA_GRAPH
from stages.answers import held_adapters
from stages.answers.generation import OnnxModel
from stages.answers.runtime import GRAPH, og, open_model

ONNX = Path("models/onnx")
ADAPTER = Path("models/onnx_adapter/adapter.onnx_adapter")
PROMPT, NEW, REPEATS = 16, 128, 4
TOKENS = np.random.default_rng(0).integers(10, 300, (1, PROMPT), dtype=np.int32)


def main() -> None:
    """Measure all ways in one run: GenAI's, then ours without the operator, then ours."""
    base = OnnxModel(ONNX)
    base.generate(TOKENS[0].tolist(), 2)
    figures: dict[str, Any] = {"gpu_mib_base": gpu_memory()}
    three = OnnxModel(ONNX, dict.fromkeys("abc", ADAPTER))
    for name in "abc":
        three.generate(TOKENS[0].tolist(), 2, name)
    figures["gpu_mib_three_adapters"] = gpu_memory()
    for name, graph, adapter in (("base", GRAPH, None), ("adapter", LORA_GRAPH, ADAPTER)):
        make = runtime_generator(graph, adapter)
        speed, _ = decode(make)
        figures[f"genai_{name}"] = {"tokens_per_s": speed}
        if adapter:
            wanted = logits_of(make)
    figures["base"] = measured(base, None)
    with mock.patch.object(held_adapters, "open_operator", return_value=None):
        figures["weights"] = measured(OnnxModel(ONNX, {"a": ADAPTER}), "a", wanted)
    figures["operator"] = measured(three, "a", wanted)
    figures["operator_none_chosen"] = measured(three, None)
    figures["each_keeps_its_own_in_turn"] = in_turn(three, base)
    figures["kernels"] = kernels(lambda: generator(three, "a"))
    keep("gpu_adapters", figures)


def measured(
    model: OnnxModel, adapter: str | None, wanted: np.ndarray | None = None
) -> dict[str, Any]:
    """Return a model's figures with an adapter, and how far its logits are off the wanted ones."""
    speed, _ = decode(lambda: generator(model, adapter))
    figures = {"tokens_per_s": speed, "ms_for_1000_tokens": prefill(model, adapter)}
    if wanted is not None:
        found = model.logits(TOKENS[0].tolist(), adapter)
        figures["logits_off_sd"] = float(f"{(found - wanted).std() / wanted.std():.2g}")
    return figures


def generator(model: OnnxModel, adapter: str | None) -> og.Generator:
    """Return a new generator for the prompt and its answer."""
    return model.generator(PROMPT + NEW, adapter, to_the_end=True)


def prefill(model: OnnxModel, adapter: str | None) -> float:
    """Return the fewest milliseconds that a prompt of 1,000 tokens took."""
    prompt = np.random.default_rng(1).integers(10, 300, 1000).tolist()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        model.logits(prompt, adapter)
        times.append(time.perf_counter() - started)
    return round(min(times) * 1e3, 1)


def in_turn(model: OnnxModel, base: OnnxModel) -> bool:
    """Say whether generators that take a token each in turn say what each says alone."""
    chosen = ["a", None, "b", "a"]
    alone = {None: decode(lambda: generator(base, None))[1]}
    alone["a"] = alone["b"] = decode(lambda: generator(model, "a"))[1]
    generators = [generator(model, name) for name in chosen]
    for each in generators:
        each.append_tokens(TOKENS)
    for _ in range(NEW // 2):
        for each in generators:
            each.generate_next_token()
    said = [[int(token) for token in each.get_sequence(0)] for each in generators]
    return all(alone[name][: len(text)] == text for name, text in zip(chosen, said, strict=True))


def runtime_generator(graph: str, adapter: Path | None) -> Callable[[], og.Generator]:
    """Return what makes generators as the runtime's manual does: og.Adapters, no CUDA graph."""
    model = open_model(ONNX, graph)
    adapters = og.Adapters(model)
    if adapter:
        adapters.load(str(adapter), "a")

    def make() -> og.Generator:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=PROMPT + NEW, min_length=PROMPT + NEW, do_sample=False)
        generator = og.Generator(model, params)
        if adapter:
            generator.set_active_adapter(adapters, "a")
        return generator

    return make


def decode(make: Callable[[], og.Generator]) -> tuple[float, list[int]]:
    """Return tokens per second, the median step of all answers but the first, and the tokens."""
    speeds = []
    for _ in range(REPEATS):
        generator = make()
        generator.append_tokens(TOKENS)
        generator.generate_next_token()
        ticks = []
        for _ in range(NEW - 2):
            generator.generate_next_token()
            ticks.append(time.perf_counter())
        speeds.append(1 / float(np.median(np.diff(ticks))))
        tokens = [int(token) for token in generator.get_sequence(0)]
    return round(float(np.median(speeds[1:])), 1), tokens


def logits_of(make: Callable[[], og.Generator]) -> np.ndarray:
    """Return the logits after every token of the prompt."""
    generator = make()
    generator.append_tokens(TOKENS)
    return np.asarray(generator.get_output("logits"), dtype=np.float32)[0]


def gpu_memory() -> int:
    """Return the MiB in use on the first GPU."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0])


if __name__ == "__main__":
    main()
