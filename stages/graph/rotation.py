"""Every layer's rotary positions in a graph: PyTorch's own tables, whatever the builder makes of a rope type.

Only longrope, which has two tables and changes from one to the other, stays the builder's.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from stages.graph.packed_embedding import append
from stages.weights.families import rope_settings

COS = {
    "GroupQueryAttention": 7,
    "RotaryEmbedding": 2,
}  # the input of an operator; the sines are the next
Table = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [positions, half of what is rotated]


def rotate_as_pytorch(attention: list[ir.Node], config: PretrainedConfig, path: Path) -> None:
    """Give the attention nodes of all layers PyTorch's tables; those of layers without positions, none."""
    if any(rope.get("rope_type") == "longrope" for rope in rope_settings(config).values()):
        return
    tables = rotations(config)
    written: dict[tuple[str, str], ir.Value] = {}
    layers = zip(attention, kinds(config), strict=True)
    for node, kind in ((node, kind) for layer, kind in layers for node in rotating(layer)):
        if kind is None:
            do_not_rotate(node)
            continue
        for part in (0, 1):
            index = COS[node.op_type] + part
            value = node.inputs[index]
            place = value.name, kind
            if place not in written:
                table = tables[kind][part]
                # the builder may have made one table for layers that PyTorch rotates by two
                if any(name == value.name for name, _ in written):
                    value = beside(value, f"{value.name}_{kind}", path)
                    node.graph.register_initializer(value)
                overwrite(value, table, path)
                written[place] = value
            node.replace_input_with(index, written[place])


def rotating(attention: ir.Node) -> list[ir.Node]:
    """Return the nodes that rotate a layer's queries and keys: the attention itself, or two before it."""
    if len(attention.inputs) > COS[attention.op_type] and attention.inputs[COS[attention.op_type]]:
        return [attention]
    before = [value.producer() for value in attention.inputs[:2] if value is not None]
    return [node for node in before if node is not None and node.op_type == "RotaryEmbedding"]


def do_not_rotate(node: ir.Node) -> None:
    """Let a node hand on what it would rotate."""
    if node.op_type == "RotaryEmbedding":
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        node.graph.remove(node, safe=True)
        return
    node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)
    for index in (COS[node.op_type], COS[node.op_type] + 1):
        node.replace_input_with(index, None)


def kinds(config: PretrainedConfig) -> list[str | None]:
    """Return by which settings every layer rotates; None where it does not."""
    count = config.num_hidden_layers
    names = config.layer_types if "" not in rope_settings(config) else [""] * count
    # 1 where a layer rotates, despite the name
    rotates = getattr(config, "no_rope_layers", None) or [1] * count
    return [name if turns else None for name, turns in zip(names, rotates, strict=True)]


@torch.no_grad()
def rotations(config: PretrainedConfig) -> dict[str, Table]:
    """Return what PyTorch rotates by at every position of the context, by kind of layer."""
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    rotary = type(model.model.rotary_emb)(config)
    positions, like = torch.arange(config.max_position_embeddings)[None], torch.empty(0)
    tables = {}
    for kind in {kind for kind in kinds(config) if kind is not None}:
        both = rotary(like, positions, *([kind] if kind else []))
        # transformers writes every angle twice, for both halves of a head
        tables[kind] = tuple(part[0, :, : part.shape[-1] // 2] for part in both)
    return tables


def beside(value: ir.Value, name: str, path: Path) -> ir.Value:
    """Return an initializer like another, with bytes of its own at the data file's end."""
    old = value.const_value
    offset = append(path.with_name(old.location), bytes(old.nbytes))
    where = {"name": name, "shape": old.shape, "base_dir": path.parent}
    tensor = ir.ExternalTensor(old.location, offset, old.nbytes, old.dtype, **where)
    return ir.Value(name=name, shape=value.shape, type=value.type, const_value=tensor)


def overwrite(value: ir.Value, table: torch.Tensor, path: Path) -> None:
    """Write a table over an initializer's bytes in the graph's data file."""
    tensor = value.const_value
    if list(tensor.shape) != list(table.shape):
        raise ValueError(f"{value.name} is {tensor.shape}, and PyTorch's {tuple(table.shape)}")
    with path.with_name(tensor.location).open("r+b") as data:
        data.seek(tensor.offset)
        data.write(table.contiguous().numpy().astype(tensor.dtype.numpy()).tobytes())
