"""Build an ONNX Runtime GenAI model from a checkpoint: Olive's ModelBuilder, as conf/optimize says."""

from __future__ import annotations

from pathlib import Path

from olive.hardware import AcceleratorSpec
from olive.model import HfModelHandler, ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.model_builder import ModelBuilder

from stages.checkpoint import load_dequantized, load_tokenizer
from stages.settings import Optimize

PROVIDERS = {
    "cpu": AcceleratorSpec("cpu", "CPUExecutionProvider"),
    "cuda": AcceleratorSpec("gpu", "CUDAExecutionProvider"),
    "dml": AcceleratorSpec("gpu", "DmlExecutionProvider"),
    "webgpu": AcceleratorSpec("gpu", "WebGpuExecutionProvider"),
}


def export(checkpoint: Path, options: Optimize, scratch: Path) -> ONNXModelHandler:
    """Return the graph; the integers of a packed checkpoint go into it as they are."""
    if options.precision != "int4":
        checkpoint = dequantized_copy(checkpoint, scratch / "float")
    config = {"precision": options.precision, "int4_accuracy_level": options.accuracy_level}
    builder = create_pass_from_dict(
        ModelBuilder,
        {key: value for key, value in config.items() if value is not None},
        disable_search=True,
        accelerator_spec=PROVIDERS[options.execution_provider],
    )
    return builder.run(HfModelHandler(str(checkpoint)), str(scratch / "onnx"))


def dequantized_copy(checkpoint: Path, folder: Path) -> Path:
    """Write a packed checkpoint's weights as float32, for a graph without quantized kernels."""
    load_dequantized(checkpoint).save_pretrained(folder)
    load_tokenizer(checkpoint).save_pretrained(folder)
    return folder
