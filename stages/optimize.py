"""Build the ONNX model: models/quantized to models/onnx, with optional inputs for LoRA adapters.

    python -m stages.optimize        # conf/optimize says for which execution provider and precision

The graph depends on which modules an adapter may target, not on any adapter: training again does not
build it again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from olive.passes.olive_pass import create_pass_from_dict

from stages.export import export
from stages.passes.lora_inputs import LoraInputs, read_sites
from stages.running import (
    in_megabytes,
    quietly,
    run,
    size_of,
    written_beside,
)
from stages.settings import Settings

QUANTIZED = Path("models/quantized")
ONNX = Path("models/onnx")


def optimize(settings: Settings) -> str:
    """Export, add the LoRA inputs, save."""
    targets = settings.finetune.target_modules
    with tempfile.TemporaryDirectory(dir=ONNX.parent) as scratch, written_beside(ONNX) as folder:
        with quietly():
            graph = export(QUANTIZED, settings.optimize, Path(scratch))
            add_lora_inputs(graph, targets, folder)
        sites = len(read_sites(folder))
    return f"{ONNX} ({in_megabytes(size_of(ONNX))}, {sites} projections take an adapter)"


def add_lora_inputs(graph, targets: list[str] | str, folder: Path) -> None:
    """Run our pass on the exported graph."""
    modules = None if targets == "all-linear" else list(targets)
    lora = create_pass_from_dict(LoraInputs, {"target_modules": modules}, disable_search=True)
    lora.run(graph, str(folder))


if __name__ == "__main__":
    run(optimize)
