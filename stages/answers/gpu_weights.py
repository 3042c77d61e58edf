"""An NVIDIA GPU holds one copy of the base's weights, for its own graph and for any number of adapters.

    graph = load_graph(folder).graph      # lora.onnx
    entries = base_weights(graph) + adapter_weights(file, folder, graph)
    config.overlay({"model": {"decoder": {"filename": "lora.onnx", "shared_initializers": entries}}})

ONNX Runtime GenAI's own adapters (og.Adapters) stay in the computer's memory and are copied to the GPU at
every token since genai#2424: on an H100 that left a quarter of the speed. Its `shared_initializers`
(genai#2389) name bytes of files, which go to the GPU once and are shared by all models of a process. An
adapter's A and B, inputs of lora.onnx with empty defaults, are given as such bytes: one og.Model for each
adapter, which costs its own tensors and work space, no second base.

CUDA only: on a CPU the runtime refuses shared initializers.
"""

from __future__ import annotations

from os.path import relpath  # the runtime joins it to the folder
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from stages.adapters.lora_inputs import lora_inputs
from stages.adapters.names import LORA_GRAPH
from stages.answers.runtime import damaged, plain
from stages.core.errors import UserError

Entry = dict[str, Any]  # one initializer, as genai_config.json describes it
SMALLEST = 4096  # bytes: smaller constants, such as shapes, are read on the CPU


def read_graph(folder: Path, name: str) -> ir.Graph:
    """Read a folder's graph without its weights. Raises `UserError` for a file that was cut."""
    try:
        return ir.load(folder / name).graph
    except Exception as error:  # noqa: BLE001  # what protobuf says of a file that was cut
        raise damaged(folder, plain(error)) from None


def base_weights(graph: ir.Graph) -> list[Entry]:
    """Describe a graph's weights by where their bytes lie in the data file beside it."""
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    return [
        entry(name, t.location, t.offset or 0, t.nbytes, int(t.dtype), t.shape)
        for name, t in tensors.items()
        if isinstance(t, ir.ExternalTensor) and t.nbytes > SMALLEST
    ]


def adapter_weights(file: Path, folder: Path, graph: ir.Graph) -> list[Entry]:
    """Describe an adapter's A and B, inputs of a folder's graph, by where their bytes lie in its file.

    Raises `UserError` for an adapter of another model: the runtime would take any shape here.
    """
    inputs = lora_inputs(graph)
    content = file.read_bytes()
    adapter = onnxruntime.AdapterFormat.read_adapter(str(file))  # its parameters read its memory
    entries, end = [], len(content)
    for name, value in sorted(adapter.get_parameters().items()):
        array = value.numpy()
        if name not in inputs or not fits(array, inputs[name]):
            raise UserError(f"{name} {list(array.shape)} {array.dtype} is no input of {LORA_GRAPH}")
        # the file is written from its end to its start, in the order of names: the next one lies before this
        raw = array.tobytes()
        offset = content.rfind(raw, 0, end)
        if offset < 0:
            offset = content.find(raw)
        end = offset
        kind = int(ir.DataType.from_numpy(array.dtype))
        entries.append(entry(name, relpath(file, folder), offset, len(raw), kind, array.shape))
    return entries


def fits(array: np.ndarray, value: ir.Value) -> bool:
    """Say whether an adapter's tensor is of an input's element type, and of its shape but for the rank."""
    fixed = [(n, size) for n, size in zip(array.shape, value.shape, strict=False)]
    return (
        array.dtype == value.dtype.numpy()
        and array.ndim == len(value.shape)
        and all(n == size for n, size in fixed if isinstance(size, int))
    )


def entry(name: str, file: str, offset: int, length: int, kind: int, shape: Any) -> Entry:
    """Return an initializer as genai_config.json describes it; offset and length are texts there."""
    return {
        "name": name,
        "data_file": file,
        "offset": str(offset),
        "length": str(length),
        "data_type": kind,
        "shape": [int(size) for size in shape],
    }
