"""What the machine is good at: the device to use, and the fastest dtype that trains and calibrates well."""

from __future__ import annotations

import torch

# cuDNN's attention plans anew for every length: of text written token by token that was most of the time
torch.backends.cuda.enable_cudnn_sdp(False)


def device() -> str:
    """Return where tensors go: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where the GPU or CPU multiplies it faster than float32, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_instructions else torch.float32
