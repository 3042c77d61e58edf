"""AWQ as an Olive pass: fold activation-aware scales, clip, then pack as Olive's `Rtn` does.

    create_pass_from_dict(Awq, {"group_size": 64, "calibration": "tokens.safetensors"}).run(model, out)

Olive's own AWQ needs CUDA and the archived AutoAWQ. This one runs on CPU and CUDA, holds one decoder
layer on the device at a time, and writes Olive's packed checkpoint.
"""

from __future__ import annotations

import torch
from olive.common.quant.nn import QuantLinear
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam
from olive.passes.pytorch.quant_utils import finalize, get_quantizer_config, prepare_model
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from stages.architecture import LinearGroup, linear_groups
from stages.hardware import device, fast_dtype
from stages.passes.awq_search import Grid, clip, search_scales


class Awq(Pass):
    """Activation-aware weight quantization (arXiv:2306.00978)."""

    @classmethod
    def _default_config(cls, accelerator_spec):
        return {
            **get_quantizer_config(allow_embeds=True),
            "calibration": PassConfigParam(
                type_=str,
                required=True,
                description="safetensors file with `tokens`, int64 [sequences, length]",
            ),
            "scale_grid": PassConfigParam(
                type_=int, default_value=20, description="scale exponents tried"
            ),
            "clip_grid": PassConfigParam(
                type_=int, default_value=10, description="clipping ratios tried"
            ),
            "clip_min": PassConfigParam(
                type_=float, default_value=0.5, description="smallest clipping ratio"
            ),
        }

    @torch.no_grad()
    def _run_for_config(self, model, config, output_model_path):
        wrapper, quantization, retie = prepare_model(model, config)
        tokens = load_file(config.calibration)["tokens"]
        balance_layers(wrapper.model, tokens, config)
        wrapper.model.float()  # what is left to pack, so that scales are float32 everywhere
        return finalize(
            model, output_model_path, wrapper, quantization, device(), retie_word_embeddings=retie
        )


def balance_layers(model: nn.Module, tokens: torch.Tensor, config) -> None:
    """Scale, clip and pack every decoder layer in place, in forward order, by its own inputs."""
    hidden, arguments = first_layer_inputs(model, tokens)
    for layer in tqdm(model.model.layers, desc="AWQ", unit="layer"):
        layer.to(device()).float()
        groups = linear_groups(layer, model.config)
        hidden, grams = run_and_watch(layer, groups, hidden, arguments)
        for group, gram in zip(groups, grams, strict=True):
            balance(group, gram, config)
        pack(layer)
        layer.to("cpu")


def balance(group: LinearGroup, gram: torch.Tensor, config) -> None:
    """Search and fold the scales of one group of linears, then clip their weights."""
    grid = grid_of(group.consumers[0])
    weights = [linear.weight.float() for linear in group.consumers]
    scales = search_scales(
        weights, gram, grid, config.scale_grid, tie=group.gather, spread=group.spread
    )
    group.fold(scales)
    spread = group.spread(scales)
    gram = gram / torch.outer(spread, spread)
    for linear in group.consumers:
        weight = linear.weight.float()
        linear.weight.copy_(clip(weight, gram, grid, config.clip_grid, config.clip_min))


def pack(layer: nn.Module) -> None:
    """Replace the layer's linears by Olive's packed ones, while they are on the device in float32."""
    for name, linear in list(layer.named_modules()):
        if hasattr(linear, "quant_info"):
            quantizer = linear.quant_info.quantizer
            packed = QuantLinear.from_module(
                linear, quantizer.bits, quantizer.symmetric, quantizer.group_size
            )
            layer.set_submodule(name, packed)


def grid_of(linear: nn.Linear) -> Grid:
    """Return the grid that Olive will round this linear to."""
    quantizer = linear.quant_info.quantizer
    return Grid(quantizer.bits, quantizer.symmetric, quantizer.group_size)


def first_layer_inputs(model: nn.Module, tokens: torch.Tensor, batch: int = 8):
    """Return what enters the first layer: hidden states, [batch, length, hidden] each, and the rest."""
    caught: list[torch.Tensor] = []
    arguments: dict = {}

    def catch(_, args, kwargs):
        kwargs = dict(kwargs)
        states = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        caught.append(states.float())
        arguments.update(kwargs, past_key_values=None, use_cache=False)
        raise _CaughtError

    modules = [model.model.embed_tokens, model.model.rotary_emb]
    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for module in modules:
        module.to(device()).float()
    for part in tokens.to(device()).split(batch):
        # a mask per row would be kept for the last batch only: all rows are full, so none is needed
        try:
            model.model(part, use_cache=False)
        except _CaughtError:
            continue
    hook.remove()
    for module in modules:
        module.to("cpu")
    return caught, arguments


class _CaughtError(Exception):
    """Ends a forward pass once the first layer's inputs are known."""


def run_and_watch(layer, groups, hidden, arguments):
    """Run the layer; return its outputs and each group's Gram matrix, [in, in] in float32."""
    grams = [None] * len(groups)
    dtype = fast_dtype()

    def watch(index):
        def add(_, args):
            inputs = args[0].flatten(0, -2).to(dtype)
            gram = (inputs.T @ inputs).float()
            grams[index] = gram if grams[index] is None else grams[index].add_(gram)

        return add

    hooks = [g.consumers[0].register_forward_pre_hook(watch(i)) for i, g in enumerate(groups)]
    with torch.autocast(hidden[0].device.type, dtype, enabled=dtype != torch.float32):
        outputs = [layer(states, **arguments) for states in hidden]
    for hook in hooks:
        hook.remove()
    return outputs, grams
