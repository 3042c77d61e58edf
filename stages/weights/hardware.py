"""What the machine is good at: the device to use, and the fastest dtype that trains and calibrates well."""

from __future__ import annotations

import re

import torch

from stages.core import gpu_faults, gpu_locks
from stages.core.errors import UserError
from stages.core.machine import visible_gpus

# cuDNN's attention plans anew for every length: of text written token by token that was most of the time
torch.backends.cuda.enable_cudnn_sdp(False)


def device() -> str:
    """Return where tensors go: the GPU where there is one.

    Raises `UserError` for one that CUDA cannot use.
    """
    if torch.cuda.is_available():
        return "cuda"
    # hours on the CPU that nobody asked for would look like a slow GPU
    if torch.version.cuda and gpu_locks.known_gpus() and asks_for_a_gpu():
        raise UserError(
            f"this machine has a GPU, which PyTorch cannot use: {why_not()}; "
            "`CUDA_VISIBLE_DEVICES= dvc repro` uses the CPU"
        )
    return "cpu"


def asks_for_a_gpu() -> bool:
    """Say whether CUDA_VISIBLE_DEVICES names one, or is not set; -1 and Slurm's NoDevFiles name none."""
    return any(re.match(r"\d|GPU-|MIG-", gpu) for gpu in visible_gpus())


def why_not() -> str:
    """Return CUDA's reason for having no GPU, in one line."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        text = " ".join(str(error).split())
        number = re.search(r"Error \d+: .*", text)  # after a question about who called what before
        return gpu_faults.what_to_do(text) or (number[0] if number else text)
    return "its count is 0"


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where the GPU or CPU multiplies it faster than float32, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_instructions else torch.float32
