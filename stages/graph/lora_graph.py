"""An Olive pass that puts graphs that take LoRA adapters beside model.onnx, on the same data file.

    create_pass_from_dict(LoraGraph, {"target_modules": ["q_proj"]}).run(onnx_model, out)

Behind the matrix product of every targeted projection, y = x·W, lora.onnx computes y = x·W + (x·A)·B. A,
[in, rank], and B, [rank, out], are graph inputs with rank-0 defaults. A run without an adapter loads
model.onnx, at full speed; all graphs read one model.onnx.data. Decoding pays for bytes and for nodes: q, k
and v share one site where the graph fuses them, and the form "gemm" does ·B and + in one node.

lora.onnx runs in any ONNX Runtime. lora_op.onnx computes the same with one node of our own at every site, for
machines where stages/lora_op can be compiled.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from olive.hardware.constants import ExecutionProvider
from olive.model import ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

from stages.adapters.lora_inputs import BASE, FUSED
from stages.adapters.names import LORA_GRAPH, OPERATOR_GRAPH, A, B
from stages.core.errors import UserError
from stages.lora_op import DOMAIN, NUMBER, OPERATORS

PROJECTION = re.compile(r"/(model/layers\.\d+/(?:attn|mlp)/\w+)/MatMul")
# which providers do ·B and + in one node also where the rank is 0, and which of the others take empty tensors
WITH_GEMM = (ExecutionProvider.CPUExecutionProvider, ExecutionProvider.WebGpuExecutionProvider)
WITH_EMPTY = (ExecutionProvider.CPUExecutionProvider, ExecutionProvider.CUDAExecutionProvider)
WITH_OPERATOR = WITH_EMPTY  # stages/lora_op has kernels for these two
INT8 = 4  # MatMulNBits' accuracy_level for activations in int8
# operators that treat every token alike, so that [tokens, width] suits them as well as [batch, tokens, width]
PER_TOKEN = {
    "Add",
    "Gelu",
    "MatMul",
    "MatMulNBits",
    "Mul",
    "QuickGelu",
    "Sigmoid",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}


class LoraGraph(Pass):
    """Add lora.onnx to a folder that `GenaiBuilder` made."""

    @classmethod
    def _default_config(cls, accelerator_spec):
        return {
            "target_modules": PassConfigParam(
                type_=list[str],
                default_value=None,
                description="modules that adapters may target; all projections by default",
            ),
            "base": PassConfigParam(
                type_=str, default_value="", description="the base model's name, for `lab adapt`"
            ),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: Any, output_model_path: str
    ) -> ONNXModelHandler:
        source, folder = Path(model.model_path), Path(output_model_path)
        if source.parent.resolve() != folder.resolve():
            shutil.copytree(source.parent, folder, dirs_exist_ok=True)
        graph = ir.load(folder / source.name)
        provider = self.accelerator_spec.execution_provider
        on_cpu = provider == ExecutionProvider.CPUExecutionProvider
        # CUDA's Gemm does not promise anything for rank 0
        form = "gemm" if provider in WITH_GEMM and can_flatten(graph.graph) else "add"
        empty = form == "gemm" or provider in WITH_EMPTY
        add_inputs(graph.graph, config.target_modules, form, rank=0 if empty else 1)
        graph.metadata_props[BASE] = config.base
        ir.save(graph, folder / LORA_GRAPH)
        graph = ir.load(folder / source.name)
        if provider in WITH_OPERATOR and add_operators(graph.graph, config.target_modules, on_cpu):
            ir.save(graph, folder / OPERATOR_GRAPH)
        return ONNXModelHandler(folder, onnx_file_name=source.name)


def add_inputs(graph: ir.Graph, targets: list[str] | None, form: str, rank: int = 0) -> None:
    """Put a site for A and B behind every targeted projection, in place; their defaults are of that rank."""
    nodes = targeted(graph, targets)
    if form == "gemm":  # one node less at every site, and decoding waits for nodes
        flatten_tokens(graph)
    for node in nodes:
        insert_site(graph, node, form, rank)


def add_operators(graph: ir.Graph, targets: list[str] | None, on_cpu: bool) -> bool:
    """Put our operator behind every targeted projection, in place; which adapter it adds is an input.

    Returns False for a graph in an element type that it does not have.
    """
    nodes = targeted(graph, targets)
    exact = on_cpu and not all(rounds_activations(node) for node in nodes)
    dtype = nodes[0].outputs[0].dtype
    operator = OPERATORS.get(("cpu" if on_cpu else "cuda", dtype.name, exact)) if dtype else None
    if operator is None:
        return False
    number = ir.Value(name=NUMBER, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(number)
    graph.opset_imports[DOMAIN] = 1
    for node in nodes:
        x, y = node.inputs[0], node.outputs[0]
        name, module = f"{node.name}/lora", module_of(node)
        added = make(operator, [y, x, number], name, y.dtype, DOMAIN, projection=module)
        added.outputs[0].shape = y.shape
        if not on_cpu:  # room for x·A, which nobody reads
            added.resize_outputs(2)
            added.outputs[1].name = f"{name}/low"
            added.outputs[1].type = ir.TensorType(ir.DataType.FLOAT)
        replace_uses(y, added)
        graph.insert_after(node, [added])
    return True


def rounds_activations(node: ir.Node) -> bool:
    """Say whether a projection on the CPU multiplies int8 activations."""
    level = node.attributes.get("accuracy_level")
    return level is not None and level.as_int() == INT8


def targeted(graph: ir.Graph, targets: list[str] | None) -> list[ir.Node]:
    """Return the projections that targets name. Raises `UserError` where they name none."""
    modules = {node: module for node in graph if (module := module_of(node))}
    nodes = [node for node, module in modules.items() if is_targeted(module, targets)]
    if not nodes:
        leaves = sorted({module.rpartition(".")[2] for module in modules.values()})
        raise UserError(
            f"finetune.target_modules is {targets}, none of which is in the graph: "
            f"must be some of {', '.join(leaves)}"
        )
    return nodes


def module_of(node: ir.Node) -> str | None:
    """Return PEFT's name of a projection, such as model.layers.0.self_attn.q_proj; None at other nodes."""
    match = PROJECTION.match(node.name or "")
    if match is None or node.op_type not in ("MatMulNBits", "MatMul"):
        return None
    return match[1].replace("/attn/", "/self_attn/").replace("/", ".")


def is_targeted(module: str, targets: list[str] | None) -> bool:
    """Say whether targets name a projection, a part of it, or the fused module that it is a part of."""
    if targets is None:
        return True
    stem, _, leaf = module.rpartition(".")
    wholes = [whole for whole, parts in FUSED.items() if leaf in parts]
    names = [f"{stem}.{name}" for name in (leaf, *FUSED.get(leaf, ()), *wholes)]
    return any(f".{name}".endswith(f".{target}") for name in names for target in targets)


def insert_site(graph: ir.Graph, node: ir.Node, form: str, rank: int) -> None:
    """Make y = x·W into y = x·W + (x·A)·B. The form "gemm" takes x as [tokens, in]."""
    x, y, module = node.inputs[0], node.outputs[0], module_of(node) or ""
    in_features, out_features = features(node)
    a = optional_input(graph, module + A, (in_features, None), rank, x.dtype)
    b = optional_input(graph, module + B, (None, out_features), rank, x.dtype)
    # x·A first: A and B are thin, W·x is large, and A·B as one matrix would be as large as W
    low = make("MatMul", [x, a], f"{node.name}/lora_A", x.dtype)
    if form == "gemm":
        after = [make("Gemm", [low.outputs[0], b, y], f"{node.name}/lora_B", x.dtype)]
    else:
        high = make("MatMul", [low.outputs[0], b], f"{node.name}/lora_B", x.dtype)
        after = [high, make("Add", [y, high.outputs[0]], f"{node.name}/lora_Add", x.dtype)]
    # readers of y read the sum from here on; the node of the sum itself still reads y
    replace_uses(y, after[-1])
    graph.insert_before(node, [low])
    graph.insert_after(node, after)


def features(node: ir.Node) -> tuple[int, int]:
    """Return (in, out) of a projection."""
    if node.op_type == "MatMulNBits":
        return node.attributes["K"].as_int(), node.attributes["N"].as_int()
    return tuple(node.inputs[1].shape.numpy())


def optional_input(
    graph: ir.Graph, name: str, sizes: tuple[int | None, int | None], rank: int, dtype: ir.DataType
) -> ir.Value:
    """Add a graph input that may be left out: an initializer of the same name is its default, empty or zero.

    Of `sizes`, None is the rank.
    Every site has a name of its own for its rank: ONNX Runtime reuses buffers between tensors whose shapes
    have the same names, and adapters may have another rank at every site.
    """
    any_rank = f"rank_of_{name.rsplit('.', 2)[0]}"
    default = np.zeros([size or rank for size in sizes], dtype.numpy())
    value = ir.Value(
        name=name,
        shape=ir.Shape([size or any_rank for size in sizes]),
        type=ir.TensorType(dtype),
        const_value=ir.tensor(default, name=name),
    )
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def can_flatten(graph: ir.Graph) -> bool:
    """Say whether all of the layers' operators, attention aside, work on [tokens, width]."""
    operators = {node.op_type for node in in_layers(graph)}
    return operators <= PER_TOKEN | {"GroupQueryAttention"}


def in_layers(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes between the embedding and the logits."""
    return [node for node in graph if (node.name or "").startswith(("/model/layers", "/lm_head"))]


def flatten_tokens(graph: ir.Graph) -> None:
    """Run the layers on [batch · tokens, width], with [batch, tokens, width] around the attention.

    A Reshape copies nothing, and Gemm, which takes two dimensions, saves a node at every site.
    """
    layers = in_layers(graph)
    attention = [node for node in layers if node.op_type == "GroupQueryAttention"]
    # the last one: some families scale what they look up
    embedding = [node for node in graph if (node.name or "").startswith("/model/embed_tokens/")]
    rows = batch_shape(graph)
    for value in (value for node in layers for value in node.outputs):
        if value.shape is not None and not value.is_graph_output():
            value.shape = ir.Shape(["all_tokens", value.shape[-1]])
    for node in [*attention, embedding[-1]]:
        flatten_output(graph, node)
    for node in attention:
        unflatten_inputs(graph, node, rows)
    unflatten_logits(graph, rows)


def batch_shape(graph: ir.Graph) -> ir.Value:
    """Return [batch, tokens, -1] as the graph's first computation."""
    tokens = next(value for value in graph.inputs if value.name == "input_ids")
    shape = make("Shape", [tokens], "lora/shape", ir.DataType.INT64)
    rest = constant(graph, "lora/rest", [-1])
    rows = make("Concat", [shape.outputs[0], rest], "lora/rows", ir.DataType.INT64, axis=0)
    graph.insert_before(next(iter(graph)), [shape, rows])
    return rows.outputs[0]


def flatten_output(graph: ir.Graph, node: ir.Node) -> None:
    """Let every reader of a node's output see [all tokens, width]."""
    value = node.outputs[0]
    width = value.shape[-1]
    flat = constant(graph, f"lora/width_{width}", [-1, width])
    reshape = make("Reshape", [value, flat], f"{node.name}/flat", value.dtype)
    replace_uses(value, reshape)
    graph.insert_after(node, [reshape])
    value.shape = None


def unflatten_inputs(graph: ir.Graph, node: ir.Node, rows: ir.Value) -> None:
    """Give an attention its query, key and value as [batch, tokens, width]."""
    for index, value in enumerate(node.inputs[:3]):
        if value is not None:
            name = f"{node.name}/rows_{index}"
            reshape = make("Reshape", [value, rows], name, value.dtype)
            graph.insert_before(node, [reshape])
            node.replace_input_with(index, reshape.outputs[0])


def unflatten_logits(graph: ir.Graph, rows: ir.Value) -> None:
    """Return the logits as [batch, tokens, vocabulary] again, under the same name."""
    logits = next(value for value in graph.outputs if value.name == "logits")
    reshape = make("Reshape", [logits, rows], "lora/logits", logits.dtype)
    final = reshape.outputs[0]
    logits.name, final.name = "lora/flat_logits", "logits"
    final.shape, logits.shape = logits.shape, None
    graph.outputs[graph.outputs.index(logits)] = final
    graph.append(reshape)


def replace_uses(value: ir.Value, node: ir.Node) -> None:
    """Let every reader of a value read a node's output instead, except that node itself."""
    for user, index in list(value.uses()):
        if user is not node:
            user.replace_input_with(index, node.outputs[0])


def constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    """Return an int64 initializer, made at the first call."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, shape=tensor.shape, type=kind, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def make(
    operator: str,
    inputs: list[ir.Value],
    name: str,
    dtype: ir.DataType,
    domain: str = "",
    **attributes: Any,
) -> ir.Node:
    """Return a node with one output of a known element type."""
    node = ir.node(operator, inputs, attributes, name=name, domain=domain)
    node.outputs[0].name, node.outputs[0].type = f"{name}/output_0", ir.TensorType(dtype)
    return node
