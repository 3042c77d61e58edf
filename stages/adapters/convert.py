"""Convert a PEFT adapter to the file that ONNX Runtime loads."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from stages.adapters.lora_inputs import BASE_MODULES, load_graph, lora_inputs
from stages.adapters.peft_adapter import (
    read_adapter,
)
from stages.adapters.sites import (
    check_modules,
    head_widths,
    lay_out,
)


def convert(peft: Path, onnx: Path, target: Path) -> int:
    """Write a PEFT adapter for the model in `onnx`; return the number of inputs that it fills.

    Raises `UserError` for an adapter that is more than LoRA, or made for another model.
    """
    model = load_graph(onnx)
    modules = read_adapter(peft)
    check_modules(modules, model.metadata_props[BASE_MODULES].split(","), onnx)
    weights = lay_out(modules, lora_inputs(model.graph), head_widths(onnx), onnx)
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(weights[name]) for name in sorted(weights)
    }
    adapter.set_parameters(values)
    adapter.export_adapter(str(target))
    return len(weights)
