"""Build an ONNX Runtime GenAI model from a packed checkpoint: our two Olive passes, as conf/optimize says."""

from __future__ import annotations

from pathlib import Path

from olive.hardware import AcceleratorSpec
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict

from stages.core.settings import Optimize
from stages.graph.genai_builder import GenaiBuilder
from stages.graph.lora_graph import LoraGraph

PROVIDERS = {
    "cpu": AcceleratorSpec("cpu", "CPUExecutionProvider"),
    "cuda": AcceleratorSpec("gpu", "CUDAExecutionProvider"),
    "webgpu": AcceleratorSpec("gpu", "WebGpuExecutionProvider"),
    "dml": AcceleratorSpec("gpu", "DmlExecutionProvider"),
    "trt_rtx": AcceleratorSpec("gpu", "NvTensorRTRTXExecutionProvider"),
}


def export(
    checkpoint: Path,
    options: Optimize,
    targets: list[str] | str | None,
    folder: Path,
    base: str = "",
) -> None:
    """Write model.onnx and, unless `targets` is None, its twins that take adapters for these modules.

    `base` is the base model's name, by which adapters call it.
    """
    where = {"disable_search": True, "accelerator_spec": PROVIDERS[options.execution_provider]}
    kernels = {"accuracy_level": options.accuracy_level, "float32": options.float32}
    builder = create_pass_from_dict(GenaiBuilder, kernels, **where)
    model = builder.run(HfModelHandler(str(checkpoint)), str(folder))
    if targets is None:
        return
    modules = None if targets == "all-linear" else list(targets)
    adapted = {"target_modules": modules, "base": base}
    lora = create_pass_from_dict(LoraGraph, adapted, **where)
    lora.run(model, str(folder))  # in place: the pass adds small files to gigabytes
