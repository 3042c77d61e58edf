"""The packed embedding in a graph: looked up in its integers, which a tied head shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from olive.common.quant.hf_utils import OliveHfQuantizationConfig

Tensors = dict[str, torch.Tensor]
PACKED = ("qweight", "scales", "qzeros")  # kinds of tensors of a packed module
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
PAGE = 4096  # bytes


@dataclass(frozen=True)
class PackedEmbedding:
    """Olive's packed embedding: its tensors by kind, and whether the head has the same integers."""

    packed: Tensors
    bits: int
    group_size: int
    tied: bool


def take_embedding(tensors: Tensors, config: dict) -> PackedEmbedding | None:
    """Take a packed embedding out of the tensors; where the head is tied to it, write that out."""
    if f"{EMBEDDING}.qweight" not in tensors:
        return None
    quantization = OliveHfQuantizationConfig(**config["quantization_config"])
    options = quantization.get_qlinear_init_args(EMBEDDING)
    kinds = [kind for kind in PACKED if f"{EMBEDDING}.{kind}" in tensors]
    packed = {kind: tensors.pop(f"{EMBEDDING}.{kind}") for kind in kinds}
    tied = quantization.tie_word_embeddings
    if tied:
        tensors |= {f"{HEAD}.{kind}": tensor for kind, tensor in packed.items()}
    tensors[f"{EMBEDDING}.weight"] = torch.empty(0, config["hidden_size"])
    return PackedEmbedding(packed, options["bits"], options["group_size"], tied)


def pack_embedding(model: ir.Model, path: Path, embedding: PackedEmbedding) -> None:
    """Let a graph look tokens up in the packed embedding, [vocabulary, hidden * bits / 8].

    A tied one reads the head's bytes of the data file in another shape: they are stored once.
    """
    graph = model.graph
    gather = next(node for node in graph if node.name == f"/{EMBEDDING.replace('.', '/')}/Gather")
    placeholder, tokens = gather.inputs
    output = gather.outputs[0]
    weights = [stored(model, path, kind, embedding, output.dtype) for kind in embedding.packed]
    node = ir.node(
        "GatherBlockQuantized",
        [weights[0], tokens, *weights[1:]],
        {"bits": embedding.bits, "block_size": embedding.group_size, "quantize_axis": 1},
        domain="com.microsoft",
        name=f"{gather.name}BlockQuantized",
    )
    packed = node.outputs[0]
    packed.name, packed.type, packed.shape = f"{node.name}/output_0", output.type, output.shape
    graph.insert_after(gather, node)
    output.replace_all_uses_with(packed)
    graph.remove(gather, safe=True)
    del graph.initializers[placeholder.name]


def scale_embedding(graph: ir.Graph, factor: float) -> None:
    """Multiply the embedding by `factor` itself, which the builder rounds to two decimals."""
    scaled = next(node for node in graph if node.name == f"/{EMBEDDING.replace('.', '/')}/Mul")
    dtype = scaled.outputs[0].dtype
    number = ir.tensor(np.array(factor, dtype.numpy()), name=f"{EMBEDDING}.scale")
    exact = ir.node("Constant", [], {"value": number}, name=f"{scaled.name}/factor")
    exact.outputs[0].name, exact.outputs[0].type = number.name, ir.TensorType(dtype)
    graph.insert_before(scaled, exact)
    rounded = scaled.inputs[1]
    scaled.replace_input_with(1, exact.outputs[0])
    if not rounded.uses():
        graph.remove(rounded.producer(), safe=True)


def stored(
    model: ir.Model, path: Path, kind: str, embedding: PackedEmbedding, dtype: ir.DataType
) -> ir.Value:
    """Return an initializer with one of the embedding's tensors; its bytes are in the data file."""
    graph, array = model.graph, embedding.packed[kind].contiguous().numpy()
    array = array.astype(dtype.numpy()) if kind == "scales" else array
    name, data = f"{EMBEDDING}.{kind}", path.with_name(f"{path.name}.data")
    if embedding.tied:
        # the head's bytes serve both: a second copy would be a quarter of a small model's file
        head = graph.initializers[f"{HEAD}.MatMulNBits.{kind}"].const_value
        offset, length = head.offset, head.length
    else:
        offset, length = append(data, array.tobytes()), array.nbytes
    where = {"name": name, "shape": ir.Shape(array.shape), "base_dir": path.parent}
    element = ir.DataType.from_numpy(array.dtype)
    tensor = ir.ExternalTensor(data.name, offset, length, element, **where)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(element), const_value=tensor)
    graph.register_initializer(value)
    return value


def append(file: Path, content: bytes) -> int:
    """Append to a data file at a whole page, from where it can be mapped; return the offset."""
    with file.open("ab") as stream:
        stream.write(bytes(-stream.tell() % PAGE))
        offset = stream.tell()
        stream.write(content)
    return offset
