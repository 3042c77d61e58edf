"""A graph for wasm: the packed embedding is looked up by ONNX's own operators; the weights stay in place.

    write(folder / "model.onnx", folder / "page" / FILE)

ONNX Runtime Web has GatherBlockQuantized for WebGPU and not for wasm (1.30).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

FILE = "wasm.onnx"
LOOKUP = "GatherBlockQuantized"


def write(source: Path, target: Path) -> None:
    """Write the graph of `source` as wasm computes it; its data files are named as before."""
    model = ir.load(source)
    for node in [node for node in model.graph if node.op_type == LOOKUP]:
        look_up_plainly(model.graph, node)
    ir.save(model, target)


def look_up_plainly(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a lookup in packed rows by (integers - zero points) · scales of the rows that are looked up."""
    packed, tokens, scales, *zeros = node.inputs
    bits, size = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    dtype, blocks = scales.dtype, scales.shape[-1]
    nodes: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        name = f"{node.name}/{len(nodes)}"
        made = ir.node(op_type, inputs, attributes, name=name, domain="")
        made.outputs[0].name = name
        nodes.append(made)
        return made.outputs[0]

    def constant(value: list[int] | float, kind: ir.DataType) -> ir.Value:
        made = ir.node("Constant", [], {"value": ir.tensor(np.array(value, kind.numpy()))})
        made.outputs[0].name = made.name = f"{node.name}/{len(nodes)}"
        nodes.append(made)
        return made.outputs[0]

    def integers(rows: ir.Value, count: int) -> ir.Value:
        """Return rows of packed integers as numbers, [batch, tokens, count]."""
        bytes_ = add("Cast", add("Gather", rows, tokens, axis=0), to=dtype.value)
        if bits == 8:
            return bytes_
        # two in a byte, the lower half first; of an odd number the last half is none
        high = add("Floor", add("Div", bytes_, constant(16, dtype)))
        low = add("Sub", bytes_, add("Mul", high, constant(16, dtype)))
        last = constant([-1], ir.DataType.INT64)
        pairs = add("Concat", add("Unsqueeze", low, last), add("Unsqueeze", high, last), axis=-1)
        flat = add("Reshape", pairs, constant([0, 0, -1], ir.DataType.INT64))
        ends = [constant([place], ir.DataType.INT64) for place in (0, count, 2)]
        return add("Slice", flat, *ends)

    def by_block(values: ir.Value, width: int) -> ir.Value:
        return add("Reshape", values, constant([0, 0, blocks, width], ir.DataType.INT64))

    zero = by_block(integers(zeros[0], blocks), 1) if zeros else constant(2 ** (bits - 1), dtype)
    scale = by_block(add("Gather", scales, tokens, axis=0), 1)
    rows = add("Mul", add("Sub", by_block(integers(packed, blocks * size), size), zero), scale)
    found = add("Reshape", rows, constant([0, 0, blocks * size], ir.DataType.INT64))
    output = node.outputs[0]
    found.type, found.shape = output.type, output.shape
    graph.insert_before(node, nodes)
    output.replace_all_uses_with(found)
    graph.remove(node, safe=True)
