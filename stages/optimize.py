"""Build the ONNX graphs: models/quantized to models/onnx.

    python -m stages.optimize        # conf/optimize says for which execution provider

model.onnx answers without an adapter, lora.onnx takes one as optional inputs; they share model.onnx.data.
They depend on which modules an adapter may target, not on any adapter: training does not rebuild them.
"""

from __future__ import annotations

from pathlib import Path

from stages.adapters.lora_inputs import load_graph, lora_inputs
from stages.answers.proof import prove_graph
from stages.core.files import in_megabytes, size_of, written_beside
from stages.core.running import quietly, run
from stages.core.settings import Settings
from stages.graph.export import export

QUANTIZED = Path("models/quantized")
ONNX = Path("models/onnx")
COST = Path("metrics/speed/optimize.json")


def optimize(settings: Settings) -> str:
    """Export, count the sites for LoRA's A and B, prove that the graph computes what PyTorch does."""
    targets = settings.finetune.target_modules
    with written_beside(ONNX) as folder:
        with quietly():
            export(QUANTIZED, settings.optimize, targets, folder, settings.model.name)
        sites = len(lora_inputs(load_graph(folder).graph)) // 2
        proven = prove_graph(QUANTIZED, folder, settings.optimize)
    return f"{ONNX} ({in_megabytes(size_of(ONNX))}, {sites} projections take an adapter, {proven})"


if __name__ == "__main__":
    run(optimize, COST)
