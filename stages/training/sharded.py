"""A base too large for one GPU: every rank keeps a part of each layer's weights.

    model = load_sharded(folder, options, dtype)

PyTorch's fully_shard (FSDP2) brings a layer's weights together before the layer computes, in both passes,
and lets go of them afterwards. The adapter, and what lies outside the layers, is whole on every rank: the
first is small, the other would be together anyhow when the memory is fullest. No rank ever holds more than
one layer besides its parts, and two while it computes.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from olive.common.quant.hf_utils import OliveHfQuantizationConfig
from olive.common.quant.utils import WeightQuantizer
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig

from stages.core.errors import UserError
from stages.core.settings import Finetune
from stages.training import together
from stages.weights.checkpoint import dequantize_all, empty_model, materialise
from stages.weights.hardware import device
from stages.weights.packed import PackedLinear

Tensors = dict[str, torch.Tensor]


def load_sharded(folder: Path, options: Finetune, dtype: torch.dtype) -> torch.nn.Module:
    """Load Olive's checkpoint layer by layer, and keep this rank's part of each."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    quantization = OliveHfQuantizationConfig(**config.quantization_config)
    config.tie_word_embeddings |= quantization.tie_word_embeddings  # one packed tensor for both
    del config.quantization_config
    model = empty_model(config)
    mesh = init_device_mesh(device(), (together.count(),))
    with ExitStack() as files:
        where: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = files.enter_context(safe_open(path, "pt", device=device()))
            where |= dict.fromkeys(file.keys(), file)

        def read(wanted: str) -> Tensors:
            return {n: where[n].get_tensor(n) for n in where if layer_of(n) == wanted}

        layers = list(model.model.layers)
        model.model.layers = torch.nn.ModuleList()
        materialise(model, dequantize_all(read(""), quantization, dtype), dtype)
        for number, layer in enumerate(layers):
            name = f"model.layers.{number}."
            if options.base == "packed":
                pack(layer, name, tensors := read(name), quantization, dtype)
            else:
                tensors = dequantize_all(read(name), quantization, dtype)
            fill(layer, name, tensors, dtype)
            shard(layer, mesh)
            del tensors
        model.model.layers = torch.nn.ModuleList(layers)
    # PEFT calls the whole model's `forward`, past the hooks: the decoder inside it is the root
    layers_own = set(model.model.layers.parameters())
    fully_shard(model.model, mesh=mesh, ignored_params=set(model.parameters()) - layers_own)
    return model.eval()


def shard(layer: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Spread a layer over the GPUs. Raises `UserError` where PyTorch takes no integers, as 2.11 does not."""
    try:
        fully_shard(layer, mesh=mesh)
    except RuntimeError as error:
        if "floating point" not in str(error):
            raise
        raise UserError(
            f"PyTorch {torch.__version__} spreads no packed weights: install the lock's version, "
            "or set finetune.base=dequantized"
        ) from None


def layer_of(name: str) -> str:
    """Return `model.layers.7.` for a tensor of a layer, nothing for one outside."""
    parts = name.split(".")
    return ".".join(parts[:3]) + "." if parts[:2] == ["model", "layers"] else ""


def pack(
    layer: torch.nn.Module,
    name: str,
    tensors: Tensors,
    quantization: OliveHfQuantizationConfig,
    dtype: torch.dtype,
) -> None:
    """Put packed linears into an empty layer, and take their tensors out of `tensors`."""
    for full in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        quantizer = WeightQuantizer(**quantization.get_qlinear_init_args(full))
        kinds = ("qweight", "scales", "qzeros", "bias")
        linear = PackedLinear(quantizer, dtype, *(tensors.pop(f"{full}.{k}", None) for k in kinds))
        # fully_shard leaves buffers whole
        for kind, value in list(linear._buffers.items()):
            del linear._buffers[kind]
            frozen = None if value is None else torch.nn.Parameter(value, requires_grad=False)
            linear.register_parameter(kind, frozen)
        layer.set_submodule(full.removeprefix(name), linear)


def fill(layer: torch.nn.Module, name: str, tensors: Tensors, dtype: torch.dtype) -> None:
    """Give an empty layer its weights, frozen. Raises `UserError` for one that is missing."""
    weights = {
        key.removeprefix(name): value.to(dtype)
        for key, value in tensors.items()
        if key.startswith(name)
    }
    layer.load_state_dict(weights, strict=False, assign=True)
    layer.requires_grad_(False)
    if missing := [key for key, value in layer.named_parameters() if value.is_meta]:
        raise UserError(
            f"{name}{missing[0]} is missing from the checkpoint: run dvc repro fetch quantize"
        )
