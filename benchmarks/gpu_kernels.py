"""The kernels of a decoding step on an NVIDIA GPU, by PyTorch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from stages.answers.runtime import og

PROFILED = 8
TOKENS = np.random.default_rng(0).integers(10, 300, (1, 16), dtype=np.int32)


def kernels(make: Callable[[], og.Generator]) -> dict[str, dict[str, float]]:
    """Return how often each kernel runs in a step and its microseconds there, the longest first."""
    generator = make()
    generator.append_tokens(TOKENS)
    for _ in range(4):
        generator.generate_next_token()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            generator.generate_next_token()
        torch.cuda.synchronize()
    times: defaultdict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        times[event.name].append(event.device_time_total)
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:12]
    return {
        name[:100]: {
            "count": round(len(each) / PROFILED, 1),
            "us": round(sum(each) / PROFILED, 1),
        }
        for name, each in longest
    }
