"""The LoRA inputs of an exported graph: what they are called, and which of the base's modules they belong to.

    lora_inputs(load_graph("models/onnx").graph)

Read without Olive and PyTorch, so that `lab adapt` answers at once.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from stages.adapters.names import LORA_GRAPH
from stages.core.errors import UserError

# properties of lora.onnx: the base model's name, and what its projections are called
BASE = "base"
BASE_MODULES = "base_modules"
# a projection that holds others, in PEFT's names
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def load_graph(folder: str | Path) -> ir.Model:
    """Load a folder's lora.onnx without its weights. Raises `UserError` where there is none."""
    path = Path(folder, LORA_GRAPH)
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {LORA_GRAPH}: run `dvc repro optimize` or `dvc pull` first"
        )
    return ir.load(path)


def lora_inputs(graph: ir.Graph) -> dict[str, ir.Value]:
    """Return a graph's inputs A and B by name."""
    return {value.name: value for value in graph.inputs if ".lora_" in value.name}
