"""Where an adapter's time goes on an NVIDIA GPU, and what other operators would make of x·A and ·B.

    python -m benchmarks.gpu_lora_products     # after dvc repro with optimize=cuda_int4; two minutes

Writes benchmarks/results/gpu_lora_products.json: for lora.onnx with A and B as constants, written with each
pair of operators, the tokens/s of a captured step and its kernels' microseconds; the base beside them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import keep
from stages.adapters.names import LORA_GRAPH
from stages.answers.gpu_weights import base_weights
from stages.answers.runtime import GRAPH, og, open_model

ONNX = Path("models/onnx")
ADAPTER = Path("models/onnx_adapter/adapter.onnx_adapter")
PROMPT, NEW, REPEATS, PROFILED = 16, 128, 3, 8
TOKENS = np.random.default_rng(0).integers(10, 300, (1, PROMPT), dtype=np.int32)


def main() -> None:
    """Measure the base, then every way to write the products."""
    adapter = onnxruntime.AdapterFormat.read_adapter(str(ADAPTER))
    arrays = {name: value.numpy() for name, value in adapter.get_parameters().items()}
    figures: dict[str, Any] = {"base": measure(ONNX / GRAPH)}
    ways: dict[str, tuple[Callable, Callable]] = {
        "MatMul": (plain, plain),
        "A as FusedMatMul with transB": (transposed, plain),
        "A as MatMulNBits, 8 bits": (eight_bits(128), plain),
        "A and B as MatMulNBits, 8 bits": (eight_bits(128), eight_bits(16)),
    }
    for name, (down, up) in ways.items():
        file = ONNX / "written.onnx"
        try:
            ir.save(written(arrays, down, up), file)
            figures[name] = measure(file)
        finally:
            file.unlink(missing_ok=True)
    keep("gpu_lora_products", figures)


def measure(graph: Path) -> dict[str, Any]:
    """Return tokens per second, the median step of the fastest answer, and the kernels of a step."""
    model = open_model(ONNX, graph.name, base_weights(ir.load(graph).graph), captured=True)
    return {"tokens_per_s": max(speed(model) for _ in range(REPEATS)), "kernels": kernels(model)}


def begun(model: og.Model) -> og.Generator:
    """Return a generator that has read the prompt and captured its step."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=PROMPT + NEW, min_length=PROMPT + NEW, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(TOKENS)
    for _ in range(4):
        generator.generate_next_token()
    return generator


def speed(model: og.Model) -> float:
    """Return the tokens per second of an answer's median step."""
    generator, ticks = begun(model), []
    for _ in range(NEW - 5):
        generator.generate_next_token()
        ticks.append(time.perf_counter())
    return round(1 / float(np.median(np.diff(ticks))), 1)


def kernels(model: og.Model) -> dict[str, dict[str, float]]:
    """Return how often each kernel runs in a step and its microseconds there, the longest first."""
    generator = begun(model)
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


def written(arrays: dict[str, np.ndarray], down: Callable, up: Callable) -> ir.Model:
    """Return lora.onnx with A and B as constants of other operators."""
    model = ir.load(ONNX / LORA_GRAPH)
    graph = model.graph
    for value in [value for value in graph.inputs if ".lora_" in value.name]:
        node = value.uses()[0].node
        product = (down if ".lora_A" in value.name else up)(graph, node, arrays[value.name])
        graph.insert_before(node, product)
        node.outputs[0].replace_all_uses_with(product.outputs[0])
        graph.remove(node, safe=True)
        graph.inputs.remove(value)
        del graph.initializers[value.name]
    return model


def plain(graph: ir.Graph, node: ir.Node, array: np.ndarray) -> ir.Node:
    """Return x·W as the export writes it."""
    return product("MatMul", node, [constant(graph, f"{node.name}.w", array)])


def transposed(graph: ir.Graph, node: ir.Node, array: np.ndarray) -> ir.Node:
    """Return x·(Wᵀ)ᵀ: each of few outputs reads its weights in a row."""
    weight = constant(graph, f"{node.name}.w", np.ascontiguousarray(array.T))
    return product("FusedMatMul", node, [weight], "com.microsoft", transB=1)


def eight_bits(block: int) -> Callable[[ir.Graph, ir.Node, np.ndarray], ir.Node]:
    """Return what writes x·W with 8-bit weights in blocks of `block` inputs."""

    def write(graph: ir.Graph, node: ir.Node, array: np.ndarray) -> ir.Node:
        inputs, outputs = array.shape
        padded = np.zeros((outputs, -(-inputs // block) * block), np.float32)
        padded[:, :inputs] = array.T
        blocks = padded.reshape(outputs, -1, block)
        steps = np.maximum(np.abs(blocks).max(-1) / 127, 6e-8).astype(np.float16)
        integers = np.round(blocks / steps.astype(np.float32)[..., None]).clip(-127, 127) + 128
        weights = [
            constant(graph, f"{node.name}.q", integers.astype(np.uint8)),
            constant(graph, f"{node.name}.s", steps),
        ]
        shape = {"K": inputs, "N": outputs, "bits": 8, "block_size": block}
        return product("MatMulNBits", node, weights, "com.microsoft", **shape)

    return write


def product(
    operator: str, node: ir.Node, weights: list[ir.Value], domain: str = "", **attributes: int
) -> ir.Node:
    """Return a node that reads what `node` reads, and other weights."""
    made = ir.node(
        operator, [node.inputs[0], *weights], attributes, domain=domain, name=f"{node.name}/written"
    )
    made.outputs[0].name, made.outputs[0].type = f"{made.name}/output_0", node.outputs[0].type
    return made


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add an initializer to a graph."""
    tensor = ir.tensor(array, name=name)
    kind = ir.TensorType(tensor.dtype)
    value = ir.Value(name=name, shape=tensor.shape, type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


if __name__ == "__main__":
    main()
