"""Decoding on an NVIDIA GPU with an adapter: held on the device, and as ONNX Runtime GenAI's own adapters.

python -m benchmarks.gpu_adapters          # after dvc repro with optimize=cuda_int4; a minute

Writes benchmarks/results/gpu_adapters.json: tokens/s of the median step after a prompt of 16 tokens, batch 1,
GPU memory, and whether the tokens are the same.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import keep
from stages.adapters.names import LORA_GRAPH
from stages.answers.generation import OnnxModel
from stages.answers.runtime import GRAPH, og, open_model

ONNX = Path("models/onnx")
ADAPTER = Path("models/onnx_adapter/adapter.onnx_adapter")
PROMPT, NEW, REPEATS = 16, 128, 4
TOKENS = np.random.default_rng(0).integers(10, 300, (1, PROMPT), dtype=np.int32)


def main() -> None:
    """Measure both ways in one run."""
    figures: dict[str, Any] = {"gpu_mib_before": gpu_memory()}
    for name, graph, adapter in (("base", GRAPH, None), ("adapter", LORA_GRAPH, ADAPTER)):
        speed, expected = decode(runtime_generator(graph, adapter))
        figures[f"genai_{name}"] = {"tokens_per_s": speed}
        model = OnnxModel(ONNX, {"a": adapter} if adapter else None)
        chosen = "a" if adapter else None
        speed, tokens = decode(
            lambda m=model, a=chosen: m.generator(PROMPT + NEW, a, to_the_end=True)
        )
        figures[f"ours_{name}"] = {
            "tokens_per_s": speed,
            "gpu_mib": gpu_memory(),
            "same_tokens": tokens == expected,
        }
    three = OnnxModel(ONNX, dict.fromkeys("abc", ADAPTER))
    for name in "abc":
        three.generate(TOKENS[0].tolist(), 2, name)
    figures["gpu_mib_three_adapters"] = gpu_memory()
    keep("gpu_adapters", figures)


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


def gpu_memory() -> int:
    """Return the MiB in use on the first GPU."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0])


if __name__ == "__main__":
    main()
