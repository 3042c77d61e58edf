"""The work of `lab bake`: an adapter's A and B become constants of a graph on a copy of the base's weights.

    copy_rest(onnx, folder)
    bake(onnx, adapter_values(Path("mine.onnx_adapter"), onnx), folder)

The data file of the 4-bit weights is copied byte for byte; A and B lie in a file of their own beside it, so
that two folders differ in a few megabytes. Sites that the adapter does not use are taken out of the graph.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from stages.adapters.lora_inputs import load_graph, lora_inputs
from stages.adapters.names import LORA_GRAPH, OPERATOR_GRAPH, A, B
from stages.adapters.tensors import read_tensors
from stages.answers.devices import exported_for, why_not
from stages.answers.generation import OnnxModel
from stages.answers.gpu_weights import SMALLEST, fits
from stages.answers.runtime import GRAPH, damaged, plain, read_config
from stages.core.errors import UserError

DATA = "adapter.onnx.data"
# How far logits may be off, RMS, in their standard deviations, for a constant is multiplied in another order
# than an input: by 1e-6 in float32, by 0.1 with int8 activations, of which some are rounded the other
# way. Unrelated logits are off by 1.4.
TOLERANCE = 0.3
ALIGNMENT = 64  # bytes: a cache line, as vector instructions like it
# what a folder of ours has beside its model, and none that runs elsewhere needs
OURS = (GRAPH, LORA_GRAPH, OPERATOR_GRAPH, "merge.json")


def adapter_values(file: Path, onnx: Path) -> dict[str, np.ndarray]:
    """Return an adapter's tensors by the graph's names. Raises `UserError` for one of another model."""
    inputs = lora_inputs(load(onnx).graph)
    try:
        values = read_tensors(file)
    except Exception:  # noqa: BLE001  # the binding raises plain Exception
        raise UserError(
            f"{file} is not an ONNX Runtime adapter, or is damaged: `lab adapt PEFT_DIR` makes one"
        ) from None
    for name, array in sorted(values.items()):
        a, b = (values.get(f"{name.removesuffix(A).removesuffix(B)}{part}") for part in (A, B))
        pair = a is not None and b is not None and a.shape[-1:] == b.shape[:1]
        if name not in inputs or not fits(array, inputs[name]) or not pair:
            raise UserError(
                f"{file} is not made for the model in {onnx} ({name} {list(array.shape)} "
                f"{array.dtype} is no input of {LORA_GRAPH}): convert it for this one with "
                f"`lab adapt PEFT_DIR --model {onnx}`"
            )
    if not values:
        raise UserError(f"{file} holds no tensors: there is nothing to bake")
    return values


def load(onnx: Path) -> ir.Model:
    """Load the graph that takes adapters. Raises `UserError` for a file that was cut."""
    try:
        return load_graph(onnx)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  # what protobuf says of a file that was cut
        raise damaged(onnx, plain(error)) from None


def bake(onnx: Path, values: dict[str, np.ndarray], folder: Path) -> None:
    """Write model.onnx with an adapter's tensors as its constants into a folder that has all else."""
    model = load(onnx)
    graph = model.graph
    for name, value in lora_inputs(graph).items():
        graph.inputs.remove(value)
        if name not in values:
            del graph.initializers[name]
    with (folder / DATA).open("wb") as stream:
        for name, array in sorted(values.items()):
            value = graph.initializers[name]
            value.shape = ir.Shape(array.shape)
            value.const_value = constant(name, array, stream, folder)
    if not (folder / DATA).stat().st_size:  # all of it is small, and in the graph
        (folder / DATA).unlink()
    for node in [node for node in graph if ends_unused_site(node, graph)]:
        take_out(graph, node)
    ir.save(model, folder / GRAPH)


def copy_rest(onnx: Path, folder: Path) -> None:
    """Copy the weights, the tokenizer, the chat template and the runtime's settings into a new folder."""
    folder.mkdir(parents=True)
    for file in sorted(onnx.iterdir()):
        if file.is_file() and file.name not in OURS:
            shutil.copyfile(file, folder / file.name)


def constant(name: str, array: np.ndarray, stream: Any, folder: Path) -> ir.TensorProtocol:
    """Return a constant: in the graph itself if it is small, else as bytes at the end of the data file."""
    array = np.ascontiguousarray(array)
    if array.nbytes <= SMALLEST:
        return ir.tensor(array, name=name)
    stream.write(bytes(-stream.tell() % ALIGNMENT))
    offset, kind = stream.tell(), ir.DataType.from_numpy(array.dtype)
    stream.write(array.tobytes())
    shape = ir.Shape(array.shape)
    return ir.ExternalTensor(
        DATA, offset, array.nbytes, kind, shape=shape, name=name, base_dir=folder
    )


def ends_unused_site(node: ir.Node, graph: ir.Graph) -> bool:
    """Say whether a node is the last of a site, (x·A)·B + y, whose A and B are no constants."""
    if node.op_type == "Gemm" and str(node.name).endswith("/lora_B"):
        b = node.inputs[1]
    elif node.op_type == "Add" and str(node.name).endswith("/lora_Add"):
        b = node.inputs[1].producer().inputs[1]
    else:
        return False
    return b.name not in graph.initializers


def take_out(graph: ir.Graph, last: ir.Node) -> None:
    """Take a site out of the graph: who reads its sum reads y, the product with the base's weights."""
    if last.op_type == "Gemm":
        low, y, nodes = last.inputs[0].producer(), last.inputs[2], [last]
    else:
        high = last.inputs[1].producer()
        low, y, nodes = high.inputs[0].producer(), last.inputs[0], [last, high]
    for user, index in list(last.outputs[0].uses()):
        user.replace_input_with(index, y)
    graph.remove([*nodes, low], safe=True)


def compare(onnx: Path, file: Path, folder: Path, tokens: list[int]) -> str:
    """Compare a baked folder's logits with those of the adapter as input; say how far they are off.

    Raises `UserError` if that is beyond rounding.
    """
    if reason := why_not(exported_for(read_config(onnx, GRAPH))):
        return f"not run: {reason}"
    expected = OnnxModel(onnx, {"adapter": file}).logits(tokens, "adapter")
    found = OnnxModel(folder).logits(tokens)
    off = float(((found - expected).std(axis=1) / expected.std(axis=1)).max())
    if not off <= TOLERANCE:  # NaN is not, either
        raise UserError(
            f"the baked graph's logits are off by {off:.2g} standard deviations, and rounding makes at most "
            f"{TOLERANCE}: please report it with the model's name"
        )
    return f"logits off by {off:.1g} sd"
