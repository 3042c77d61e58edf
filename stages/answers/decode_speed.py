"""Measure time to first token, decode speed and peak memory of an ONNX model, in a process of its own.

    echo '{"prompt": [1, 2, 3], "new_tokens": 16, "warmup": 1, "repeats": 3}' |
        python -m stages.answers.decode_speed models/onnx [models/onnx_adapter/adapter.onnx_adapter]

Prints one JSON object. Nothing else is loaded, so the peak memory is what an application would see.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.core.errors import UserError

if TYPE_CHECKING:
    from stages.answers.generation import OnnxModel


def measure_in_own_process(
    folder: Path, adapter: Path | None, prompt: list[int], speed: dict[str, int]
) -> dict[str, float]:
    """Run this module as a process and return the figures that it prints."""
    command = [sys.executable, "-m", "stages.answers.decode_speed", str(folder)]
    job = json.dumps({"prompt": prompt, **speed})
    done = subprocess.run(
        command + ([str(adapter)] if adapter else []), input=job, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{folder} does not run: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout)


def measure(folder: str, adapter: str | None, job: dict) -> dict[str, float]:
    """Return the median time to first token, and the median and 95th percentile of decode speed."""
    from stages.answers.generation import OnnxModel

    model = OnnxModel(folder, {"adapter": adapter} if adapter else None)
    name = "adapter" if adapter else None
    firsts, intervals = [], []
    for repeat in range(job["warmup"] + job["repeats"]):
        first, rest = time_one(model, name, job["prompt"], job["new_tokens"])
        if repeat >= job["warmup"]:
            firsts.append(first)
            intervals += rest
    return {
        "time_to_first_token_ms": round(float(np.median(firsts)) * 1e3, 1),
        "decode_tokens_per_s_p50": round(1 / float(np.percentile(intervals, 50)), 1),
        "decode_tokens_per_s_p95": round(1 / float(np.percentile(intervals, 95)), 1),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 0),
    }


def time_one(
    model: OnnxModel, adapter: str | None, prompt: list[int], new_tokens: int
) -> tuple[float, list[float]]:
    """Return the seconds to the first token, and between each of the next ones."""
    generator = model.generator(len(prompt) + new_tokens, adapter, to_the_end=True)
    started = time.perf_counter()
    for piece in model.pieces([prompt]):
        generator.append_tokens(piece)
    generator.generate_next_token()
    ticks = [time.perf_counter()]
    for _ in range(new_tokens - 1):
        generator.generate_next_token()
        ticks.append(time.perf_counter())
    return ticks[0] - started, list(np.diff(ticks))


if __name__ == "__main__":
    adapter_file = sys.argv[2] if len(sys.argv) > 2 else None
    print(json.dumps(measure(sys.argv[1], adapter_file, json.load(sys.stdin))))
