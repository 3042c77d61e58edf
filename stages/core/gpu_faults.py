"""What CUDA says when a GPU cannot be used, and what a user does about it.

    what_to_do("CUDA error: CUDA-capable device(s) is/are busy or unavailable")

The words are those of CUDA's `cudaGetErrorString`, which PyTorch and ONNX Runtime pass on.
"""

from __future__ import annotations

import re

FAULTS = {
    "busy or unavailable": (
        "another process has the GPU for itself (nvidia-smi shows it): wait for it, choose another GPU by "
        "CUDA_VISIBLE_DEVICES, or let them share it: nvidia-smi --compute-mode=DEFAULT"
    ),
    "driver version is insufficient|driver on your system is too old": (
        "the NVIDIA driver is too old: install the 580 series or newer (docs/gpu.md)"
    ),
    "system not yet initialized": (
        "the GPUs' switch is not ready: systemctl start nvidia-fabricmanager, of the driver's own version"
    ),
    "unsupported display driver|cuda driver combination|Driver/library version mismatch": (
        "the NVIDIA driver was updated under way: restart the machine"
    ),
    "no kernel image is available": (
        "this GPU is older than what PyTorch or ONNX Runtime was built for (docs/gpu.md): "
        "`CUDA_VISIBLE_DEVICES= dvc repro` uses the CPU"
    ),
    "uncorrectable (NVLink|ECC) error|has fallen off the bus": (
        "the GPU has a fault (nvidia-smi -q shows it): use another one, or restart the machine"
    ),
}


def what_to_do(text: str) -> str | None:
    """Return a fault in one line, with what to do; None for what is no fault of the machine."""
    for words, advice in FAULTS.items():
        if found := re.search(words, text, re.IGNORECASE):
            return f"{advice} (CUDA says: {found[0]})"
    return None
