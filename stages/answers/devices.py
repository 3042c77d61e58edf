"""On which device a model computes: the one that its folder was exported for, or another that is asked for.

    device = choose(config, "webgpu")           # None: the folder's own
    if reason := why_not(device): ...           # what this machine lacks, and what brings it

    python -m stages.answers.devices webgpu     # what computes there: it has just computed a sum

A folder's weights are for any device. What ties it to some are the element type of its activations and the
operators that it is made of, which conf/optimize decides.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnxruntime

from stages.core.errors import UserError

# what --device takes: the devices that ONNX Runtime GenAI's Python packages for Linux have
DEVICES = ("cpu", "cuda", "webgpu")
# ONNX Runtime GenAI's names of providers, in lower case, by ours
PROVIDERS = {"cuda": "cuda", "webgpu": "webgpu", "dml": "dml", "trt_rtx": "nvtensorrtrtx"}
# on which devices a folder runs that was exported for one
RUNS_ON = {
    "cpu": ("cpu", "webgpu"),
    "cuda": ("cuda",),
    "webgpu": ("webgpu", "cpu"),
    "dml": ("cpu",),
    "trt_rtx": ("cpu",),
}
SOFTWARE = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"  # the provider's own switch
ELSEWHERE = {
    "dml": "DirectML is of Windows: `lab bake` makes a folder for onnxruntime-genai-directml there",
    "trt_rtx": "TensorRT-RTX's provider is not installed by us: `lab bake` makes a folder for a machine with "
    "onnxruntime-ep-nv-tensorrt-rtx and a GeForce RTX",
}
# what ONNX Runtime and Dawn say, and what it means: a pattern, then our words
KNOWN = {
    "requires f16|'f16' type used without|shader-f16": "its activations are float16, which this GPU's driver "
    "does not offer to WebGPU: export it with `-S optimize=webgpu_int4`, which is float32",
    "Failed to get a WebGPU adapter|No supported adapters": "no GPU with a Vulkan driver was found: "
    "install the GPU's driver, `vulkaninfo --summary` shows what there is; or --device cpu",
    "WebGPU execution provider is not supported": "no GPU is visible to WebGPU here: --device cpu, or "
    f"{SOFTWARE}=1 lets the processor stand in for one, through a Vulkan driver in software, which is slow",
    "CUDA execution provider is not (enabled|supported)": "this ONNX Runtime has no CUDA: rm -rf .venv, then "
    "make setup EXTRA=cuda",
    "[Dd]evice (was |is )?lost|DeviceLost": "the GPU was reset while it computed (its driver gave up, or "
    "took a step for hanging): ask for less at once, or --device cpu",
    "ERROR_OUT_OF_DEVICE_MEMORY|out of (device )?memory": "the GPU has too little memory free for it: close "
    "what else uses it, or --device cpu",
}


def exported_for(config: dict[str, Any]) -> str:
    """Return the provider that a folder was exported for, by our name, from its genai_config.json."""
    options = config["decoder"]["session_options"].get("provider_options") or [{}]
    names = {name.lower() for each in options for name in each}
    return next((ours for ours, theirs in PROVIDERS.items() if theirs in names), "cpu")


def choose(config: dict[str, Any], wanted: str | None) -> str:
    """Return the device to run a folder on. Raises `UserError` where the folder does not run on it."""
    own = exported_for(config)
    if wanted is None or wanted == own:
        return own
    if wanted not in DEVICES:
        raise UserError(f"--device {wanted}: must be one of {', '.join(DEVICES)}")
    if wanted not in RUNS_ON.get(own, (own,)):
        raise UserError(
            f"the model was exported for {own}, and does not run on {wanted}: "
            f"`dvc exp run -S optimize={wanted}_int4` makes one that does"
        )
    return wanted


def need(device: str) -> None:
    """Make a device ready. Raises `UserError` where this machine lacks something."""
    if reason := why_not(device):
        raise UserError(f"{device} is not to be had here: {reason}")


def why_not(device: str) -> str:
    """Say in one line why a device is not to be had here, or nothing."""
    if device in ELSEWHERE:
        return ELSEWHERE[device]
    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this machine has no CUDA: `make setup EXTRA=cuda` on one with an NVIDIA GPU"
    return _register_webgpu() if device == "webgpu" else ""


@cache
def _register_webgpu() -> str:
    """Make WebGPU's provider known to ONNX Runtime GenAI; say what it lacks, or nothing."""
    if find_spec("onnxruntime_ep_webgpu") is None:
        return (
            "WebGPU is a package of its own: `pip install -r requirements/webgpu.txt` brings "
            "onnxruntime-ep-webgpu"
        )
    # the provider finds no adapter then, and does not say why
    if sys.platform == "linux" and not _has_vulkan():
        return "there is no Vulkan loader, libvulkan.so.1: `apt-get install libvulkan1`"
    import onnxruntime_ep_webgpu as provider
    import onnxruntime_genai as og

    try:
        og.register_execution_provider_library("webgpu", provider.get_library_path())
    except Exception as error:  # noqa: BLE001  # the binding raises plain Exception
        return (
            f"onnxruntime-ep-webgpu does not fit this ONNX Runtime ({' '.join(str(error).split())}): "
            "`pip install -r requirements/cpu.txt -r requirements/webgpu.txt` brings those that do"
        )
    return ""


def _has_vulkan() -> bool:
    try:
        ctypes.CDLL("libvulkan.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def in_software() -> bool:
    """Say whether WebGPU may be the processor's work here, thousands of times as slow as a GPU's."""
    return os.environ.get(SOFTWARE) == "1"


def explained(reason: str) -> str:
    """Return what a runtime said in the words of who reads it, where we know what it means."""
    return next((words for said, words in KNOWN.items() if re.search(said, reason)), reason)


def compute(device: str) -> str:
    """Let a device compute a sum; name what did it. Raises `UserError` where it cannot.

    Only ONNX Runtime tells of a device's name, and a process has one of it beside ONNX Runtime GenAI's: this
    is for a process of its own.
    """
    if reason := why_not(device):
        raise UserError(reason)
    options = onnxruntime.SessionOptions()
    try:
        if device == "webgpu":
            import onnxruntime_ep_webgpu as provider

            onnxruntime.register_execution_provider_library("webgpu", provider.get_library_path())
            all_devices = onnxruntime.get_ep_devices()
            offered = [each for each in all_devices if each.ep_name == provider.get_ep_name()]
            if not offered:
                raise UserError(explained("WebGPU execution provider is not supported"))
            options.add_provider_for_devices(offered[:1], {})
        providers = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider"]}.get(device)
        session = onnxruntime.InferenceSession(one_sum(), options, providers=providers)
        (found,) = session.run(None, {"x": np.array([1, 2], np.float32)})
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(explained(" ".join(str(error).split()))) from None
    if found.tolist() != [2, 4]:
        raise UserError(f"it computes 1 + 1, 2 + 2 as {found.tolist()}: update its driver")
    if device != "webgpu":
        return device
    kind = offered[0].device
    software = ", the processor in its place" if kind.type.name == "CPU" else ""
    return f"webgpu ({kind.vendor or 'a GPU'}{software})"


def one_sum() -> bytes:
    """Return a graph that adds its input to itself."""
    import onnx_ir as ir

    kind = {"shape": ir.Shape([2]), "type": ir.TensorType(ir.DataType.FLOAT)}
    x, total = ir.Value(name="x", **kind), ir.Value(name="total", **kind)
    node = ir.node("Add", [x, x], outputs=[total])
    graph = ir.Graph([x], [total], nodes=[node], opset_imports={"": 17})
    return ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()


def main() -> int:
    """Say what computes, or why nothing does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("device", choices=DEVICES)
    device = parser.parse_args().device
    try:
        print(compute(device))
    except UserError as error:
        print(f"{device}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
