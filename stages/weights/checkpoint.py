"""Read models from disk: the float base, and Olive's packed checkpoint back as plain float weights.

Training and parity need the weights that inference will have, in modules that PEFT accepts (it rejects
Olive's QuantLinear), so the packed integers are dequantized into ordinary linears.
"""

from __future__ import annotations

from pathlib import Path

import torch
from olive.common.quant.hf_utils import OliveHfQuantizationConfig
from olive.common.quant.utils import WeightQuantizer, unpack_from_uint8
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)

from stages.core.errors import UserError
from stages.weights.hardware import device
from stages.weights.packed import PackedLinear


def load_float(folder: str | Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Load a float checkpoint for inference on the device."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return model.eval().to(device())


def load_dequantized(folder: str | Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Load Olive's packed checkpoint as a float model with exactly the weights that it encodes."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not hasattr(config, "quantization_config"):
        return load_float(folder, dtype)
    quantization = OliveHfQuantizationConfig(**config.quantization_config)
    config.tie_word_embeddings |= quantization.tie_word_embeddings  # one packed tensor for both
    del config.quantization_config
    weights = dequantize_all(read_safetensors(Path(folder)), quantization, dtype)
    return materialise(empty_model(config), weights, dtype)


def load_packed(folder: str | Path, dtype: torch.dtype) -> torch.nn.Module:
    """Load Olive's packed checkpoint for training: decoder linears stay 4-bit (`PackedLinear`)."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    quantization = OliveHfQuantizationConfig(**config.quantization_config)
    del config.quantization_config
    packed = read_safetensors(Path(folder))
    in_layers = {name for name in packed if name.startswith("model.layers.")}
    outside = {name: tensor for name, tensor in packed.items() if name not in in_layers}
    model = empty_model(config)
    for module in {name.rpartition(".")[0] for name in in_layers if name.endswith(".qweight")}:
        quantizer = WeightQuantizer(**quantization.get_qlinear_init_args(module))
        parts = [
            packed.pop(f"{module}.{kind}", None) for kind in ("qweight", "scales", "qzeros", "bias")
        ]
        model.set_submodule(module, PackedLinear(quantizer, dtype, *parts))
    norms = {name: packed[name] for name in in_layers if name in packed}
    weights = dequantize_all(outside, quantization, dtype) | norms
    return materialise(model, weights, dtype)


def empty_model(config: PretrainedConfig) -> torch.nn.Module:
    """Return the model without values: its weights are read next, and initialising takes longer."""
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def materialise(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.nn.Module:
    """Give an empty model its weights, and its rotary embedding the values that it computes."""
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if missing := [name for name, value in model.named_parameters() if value.is_meta]:
        raise UserError(
            f"{missing[0]} is missing from the checkpoint: run dvc repro fetch quantize"
        )
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    if hasattr(embedding := model.model.embed_tokens, "scalar_embed_scale"):  # Gemma's
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)
    return model.eval().to(device())


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a folder by name, on the device."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file, device=device()))
    return tensors


def dequantize_all(
    packed: dict[str, torch.Tensor], settings: OliveHfQuantizationConfig, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return plain weights by name in `dtype` for packed modules, and other tensors as they are."""
    weights = {}
    for name, tensor in packed.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            options = settings.get_qlinear_init_args(module)
            weight = dequantize(packed, module, WeightQuantizer(**options))
            weights[f"{module}.weight"] = weight.to(dtype)
        elif kind not in ("scales", "qzeros"):
            weights[name] = tensor
    if settings.tie_word_embeddings:
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        weights[head] = weights[embedding] = weights.get(embedding, weights.get(head))
    return weights


def dequantize(
    packed: dict[str, torch.Tensor], module: str, quantizer: WeightQuantizer
) -> torch.Tensor:
    """Return one module's weight, [out, in], from its packed integers, scales and zero points."""
    qweight, scales = packed[f"{module}.qweight"], packed[f"{module}.scales"]
    shape = (qweight.shape[0], qweight.shape[1] * 8 // quantizer.bits)
    integers = unpack_from_uint8(qweight, quantizer.bits, shape)
    if f"{module}.qzeros" in packed:
        zeros = unpack_from_uint8(packed[f"{module}.qzeros"], quantizer.bits, scales.shape)
    else:
        zeros = torch.full_like(scales, quantizer.midq, dtype=torch.int32)
    return quantizer.dequantize(integers, scales.float(), zeros)
