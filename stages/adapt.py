"""Convert the PEFT adapter to the file that ONNX Runtime loads: models/adapter to models/onnx_adapter.

    python -m stages.adapt           # for one trained elsewhere: lab adapt PEFT_DIR

Everything that the adapter holds is checked against the inputs of models/onnx/lora.onnx before a file is
written: an adapter either works as it does in PEFT, or is refused in one line.
"""

from __future__ import annotations

from pathlib import Path

from stages.adapters.convert import convert
from stages.core.files import in_megabytes, size_of, written_beside
from stages.core.running import run
from stages.core.settings import Settings

ADAPTER = Path("models/adapter")
QUANTIZED = Path("models/quantized")  # what PEFT computes with, for the proof
ONNX = Path("models/onnx")
ONNX_ADAPTER = Path("models/onnx_adapter")
COST = Path("metrics/speed/adapt.json")


def adapt(_: Settings) -> str:
    """Read the adapter, lay it out as the graph wants it, prove that it does what PEFT does, save."""
    from stages.answers.proof import (
        prove_adapter,  # `lab adapt` needs no PyTorch, which takes seconds
    )

    with written_beside(ONNX_ADAPTER) as folder:
        folder.mkdir()
        file = folder / "adapter.onnx_adapter"
        inputs = convert(ADAPTER, ONNX, file)
        proven = prove_adapter(QUANTIZED, ADAPTER, ONNX, file)
    return f"{ONNX_ADAPTER} ({in_megabytes(size_of(ONNX_ADAPTER))}, {inputs} inputs, {proven})"


if __name__ == "__main__":
    run(adapt, COST)
