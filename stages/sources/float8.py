"""Bring a checkpoint in FP8 back to plain floats; refuse one that is quantized in any other way.

FP8 weights times their scales are what the model computes with, so that nothing is lost that later stages
could use. A scale is for a whole weight, for each row, or for each block, usually of 128x128 values.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stages.core.errors import UserError
from stages.core.files import read_json, write_json, written_beside
from stages.sources.headers import INDEX, Stored, read_headers

FLOATS = {"F64", "F32", "F16", "BF16"}
FLOAT8 = {"F8_E4M3", "F8_E5M2"}
SCALES = ("weight_scale_inv", "weight_scale")  # both are factors, whatever the name says
# for activations, keys and values, which a float model does not round
UNUSED = ("input_scale", "output_scale", "activation_scale", "k_scale", "v_scale", "kv_scale")
BLOCK = (128, 128)
REMEDY = "choose the float model"


def restore(folder: Path) -> str:
    """Rewrite FP8 weights as floats, in place; return what to say of it.

    Raises `UserError` for a model that is quantized in another way, or whose scales do not fit.
    """
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(settings, dict):
        settings = {"quant_method": settings}
    stored = read_headers(folder)
    if odd := [t for t in stored.values() if t.dtype not in FLOATS | FLOAT8]:
        raise UserError(
            f"{odd[0].name} at model.source is {odd[0].dtype}: quantized{method(settings)}: {REMEDY}"
        )
    rounded = [tensor.name for tensor in stored.values() if tensor.dtype in FLOAT8]
    if not rounded and settings:
        raise UserError(f"config.json at model.source says quantized{method(settings)}: {REMEDY}")
    if not rounded:
        return ""
    scales = {name: scale_of(name, stored, settings) for name in rounded}
    dtype = float_dtype(stored)
    rewrite(folder, stored, scales, block_of(settings), dtype)
    for key in ("quantization_config", "compression_config", "torch_dtype"):
        config.pop(key, None)
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    return f", from FP8 to {str(dtype).removeprefix('torch.')}"


def method(settings: dict[str, Any]) -> str:
    """Name the method of a quantization_config."""
    name = settings.get("quant_method") or settings.get("quant_algo")
    return f" already, by {name}" if name else " already"


def scale_of(name: str, stored: dict[str, Stored], settings: dict[str, Any]) -> Stored | None:
    """Return the scale of an FP8 weight; None where nothing says that there is one."""
    module = name.removesuffix(".weight")
    for kind in SCALES:
        if found := stored.get(f"{module}.{kind}"):
            return found
    if settings:
        raise UserError(f"{name} at model.source is FP8 without its {SCALES[0]}: {REMEDY}")
    return None


def float_dtype(stored: dict[str, Stored]) -> torch.dtype:
    """Return float32 where the embedding has it, else bfloat16, which no scaled weight overflows."""
    embeddings = [t.dtype for name, t in stored.items() if name.endswith("embed_tokens.weight")]
    return torch.float32 if embeddings == ["F32"] else torch.bfloat16


def block_of(settings: dict[str, Any]) -> tuple[int, int]:
    """Return the size of the blocks that have a scale each."""
    size = settings.get("weight_block_size")
    return (size[0], size[1]) if isinstance(size, list) and len(size) == 2 else BLOCK


def rewrite(
    folder: Path,
    stored: dict[str, Stored],
    scales: dict[str, Stored | None],
    block: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    """Write every file again, with floats for FP8 and without scales."""
    used = {scale.name for scale in scales.values() if scale}
    # all at once, as the file of a scale may be rewritten before the weight's
    factors = {name: scale.read() if scale else None for name, scale in scales.items()}
    for file in sorted({tensor.file for tensor in stored.values()}):
        tensors = load_file(file)
        for name in list(tensors):
            if name in scales:
                tensors[name] = dequantize(name, tensors[name], factors[name], block).to(dtype)
            elif name in used or name.rpartition(".")[2] in UNUSED:
                del tensors[name]
        with written_beside(file) as beside:  # the tensors may still be views of the old file
            save_file(tensors, beside, metadata={"format": "pt"})
    if (folder / INDEX).is_file():
        left = {name: tensor.file.name for name, tensor in read_headers(folder).items()}
        write_json(folder / INDEX, {"metadata": {}, "weight_map": left})


def dequantize(
    name: str, weight: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int]
) -> torch.Tensor:
    """Return an FP8 weight, [out, in], times its scale, in float32."""
    weight = weight.float()
    if scale is None:
        return weight
    scale, shape = scale.float(), list(weight.shape)
    if scale.numel() == 1:
        return weight * scale.reshape(())
    if list(scale.shape) in ([shape[0]], [shape[0], 1]):
        return weight * scale.reshape(shape[0], *[1] * (weight.dim() - 1))
    blocks = [math.ceil(size / part) for size, part in zip(shape, block, strict=False)]
    if weight.dim() != 2 or list(scale.shape) != blocks:
        raise UserError(
            f"the scale of {name} at model.source is {list(scale.shape)}, which does not fit a weight "
            f"of {shape} in blocks of {list(block)}: {REMEDY}"
        )
    # the last block may be cut: the scales are spread beyond the weight, and cut as well
    spread = scale.repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)
    return weight * spread[: shape[0], : shape[1]]
