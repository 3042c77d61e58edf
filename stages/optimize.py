"""Build the ONNX graphs: models/quantized to models/onnx.

    python -m stages.optimize        # conf/optimize says for which execution provider

model.onnx answers without an adapter, lora.onnx takes one as optional inputs; they share model.onnx.data.
They depend on which modules an adapter may target, not on any adapter: training does not build them anew.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from stages.export import export
from stages.lora_inputs import BASE, LORA_GRAPH, load_graph, lora_inputs
from stages.running import in_megabytes, quietly, run, size_of, written_beside
from stages.settings import Settings

QUANTIZED = Path("models/quantized")
ONNX = Path("models/onnx")


def optimize(settings: Settings) -> str:
    """Export, add the LoRA inputs and the base's name, save."""
    with written_beside(ONNX) as folder:
        with quietly():
            export(QUANTIZED, settings.optimize, settings.finetune.target_modules, folder)
        graph = load_graph(folder)
        graph.metadata_props[BASE] = settings.model.name  # for `lab adapt`
        ir.save(graph, folder / LORA_GRAPH)
        sites = len(lora_inputs(graph.graph)) // 2
    return f"{ONNX} ({in_megabytes(size_of(ONNX))}, {sites} projections take an adapter)"


if __name__ == "__main__":
    run(optimize)
