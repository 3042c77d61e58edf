"""AWQ as an Olive pass: fold activation-aware scales, then round with error compensation, and pack.

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

from stages.core import live
from stages.core.ranks import rank
from stages.quantization.architecture import LinearGroup, linear_groups
from stages.quantization.compensation import compensate, factorize
from stages.quantization.scale_search import Grid, search_scales
from stages.quantization.shares import collect, is_mine
from stages.quantization.tuning import tune
from stages.weights.checkpoint import load_float
from stages.weights.hardware import device, fast_dtype

BATCH = 8  # sequences that run through a layer together


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
                type_=int, default_value=10, description="scale exponents tried"
            ),
            "tuning_steps": PassConfigParam(
                type_=int, default_value=0, description="steps by the float model's predictions"
            ),
        }

    @torch.no_grad()
    def _run_for_config(self, model, config, output_model_path):
        wrapper, quantization, retie = prepare_model(model, config)
        tokens = load_file(config.calibration)["tokens"]
        balance_layers(wrapper.model, tokens, config.scale_grid)
        collect(wrapper.model.model.layers)
        if rank() > 0:
            return model  # the first process packs the rest and writes
        wrapper.model.float()  # what is left to pack, so that scales are float32 everywhere
        if config.tuning_steps:
            tune(wrapper.model, load_float(model.model_path), tokens, config.tuning_steps)
        return finalize(
            model, output_model_path, wrapper, quantization, device(), retie_word_embeddings=retie
        )


def balance_layers(model: nn.Module, tokens: torch.Tensor, scale_grid: int) -> None:
    """Scale, round and pack every decoder layer in place, in forward order.

    Each layer is calibrated on what float layers before it give: on rounded ones' outputs every layer would
    have to run twice, for no gain that was measured. So a layer needs nothing of those before but that: of
    several processes each runs all layers, and works on its own.
    """
    arguments = layer_arguments(model, tokens[:1])
    hidden = [first_hidden(model, part) for part in tokens.split(BATCH)]
    layers = zip(model.model.layers, arguments, strict=True)
    steps = live.steps(layers, "AWQ", "layer", len(arguments))
    for number, (layer, given) in enumerate(steps):
        # one layer at a time in float32: a GPU need not hold the model, nor a CPU two copies of it
        layer.to(device()).float()
        mine = is_mine(number)
        groups = linear_groups(layer, model.config) if mine else []
        hidden, grams = run_and_watch(layer, groups, hidden, given)
        grams = [
            balance(group, gram, scale_grid) for group, gram in zip(groups, grams, strict=True)
        ]
        # folding is over, so weights may be rounded
        for group, gram in zip(groups, grams, strict=True):
            round_and_pack(layer, group, gram)
        layer.to("cpu" if mine else "meta")  # makes room for the next one's Gram matrices


def balance(group: LinearGroup, gram: torch.Tensor, scale_grid: int) -> torch.Tensor:
    """Search and fold the scales of one group of linears; return the Gram matrix of the new inputs."""
    if group.producer is None:
        return gram
    weights = [linear.weight.float() for linear in group.consumers]
    grid = grid_of(group.consumers[0])
    scales = search_scales(weights, gram, grid, scale_grid, tie=group.gather, spread=group.spread)
    group.fold(scales)
    # folding divides the inputs by the scales, so XᵀX is divided by them on both sides: no second pass
    spread = group.spread(scales)
    return gram / torch.outer(spread, spread)


def round_and_pack(layer: nn.Module, group: LinearGroup, gram: torch.Tensor) -> None:
    """Replace a group's linears by Olive's packed ones, which hold the integers chosen here.

    Linears of one grid are rounded together, as the rows of one weight.
    """
    names = {module: name for name, module in layer.named_modules()}
    factor = factorize(gram, grid_of(group.consumers[0]).group_size)
    for grid in dict.fromkeys(map(grid_of, group.consumers)):
        linears = [linear for linear in group.consumers if grid_of(linear) == grid]
        rounded = compensate(torch.cat([each.weight.float() for each in linears]), factor, grid)
        for linear, chosen in zip(linears, rounded.split(linears), strict=True):
            # Olive packs what the weight holds; on the grid already, it rounds to the integers chosen here
            linear.weight.copy_(chosen.weight)
            packed = QuantLinear.from_module(
                linear, grid.bits, grid.symmetric, grid.group_size, chosen.steps, chosen.zeros
            )
            layer.set_submodule(names[linear], packed)


def grid_of(linear: nn.Linear) -> Grid:
    """Return the grid that Olive will round this linear to."""
    quantizer = linear.quant_info.quantizer
    return Grid(quantizer.bits, quantizer.symmetric, quantizer.group_size)


def layer_arguments(model: nn.Module, tokens: torch.Tensor) -> list[dict]:
    """Return what every layer gets beside the hidden states: masks (sliding windows differ), rotations.

    `tokens` is one full sequence, [1, length]; its arguments serve every batch of that length.
    """
    return [
        {name: on_device(value) for name, value in given.items()}
        | {"past_key_values": None, "use_cache": False}
        for _, given in layer_inputs(model, tokens)
    ]


def first_hidden(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return what the first layer reads, [sequences, length, hidden]: some families scale the embedding."""
    return on_device(layer_inputs(model, tokens)[0][0])


def layer_inputs(model: nn.Module, tokens: torch.Tensor) -> list[tuple[torch.Tensor, dict]]:
    """Return the hidden states and the other arguments that every layer is called with.

    The layers themselves are skipped. Embedded in float32, a text gets rotations that are not rounded to
    bfloat16.
    """
    seen: list[tuple[torch.Tensor, dict]] = []

    def skip(hidden, **arguments):
        seen.append((hidden, arguments))
        return hidden

    for layer in model.model.layers:
        layer.forward = skip
    model.model(inputs_embeds=model.model.embed_tokens(tokens).float(), use_cache=False)
    for layer in model.model.layers:
        del layer.forward
    return seen


def on_device(value):
    """Return a layer's argument on the device; what has floating point as float32."""
    if isinstance(value, tuple):
        return tuple(map(on_device, value))
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device(), torch.float32 if value.is_floating_point() else None)


def run_and_watch(layer, groups, hidden, arguments):
    """Run the layer; return its outputs and each group's Gram matrix, [in, in] in float32.

    The layer runs in the fast dtype; products are summed in float32: rounded to bfloat16, a Gram matrix is no
    longer positive definite, by more than the damping mends, and has no Cholesky factor.
    """
    grams = [None] * len(groups)
    dtype = fast_dtype()

    def watch(index):
        def add(_, args):
            inputs = args[0].flatten(0, -2).float()
            with torch.autocast(inputs.device.type, enabled=False):
                gram = inputs.T @ inputs
            grams[index] = gram if grams[index] is None else grams[index].add_(gram)

        return add

    # all consumers of a group read the same input, so one of them is watched
    hooks = [g.consumers[0].register_forward_pre_hook(watch(i)) for i, g in enumerate(groups)]
    with torch.autocast(hidden[0].device.type, dtype, enabled=dtype != torch.float32):
        outputs = [layer(states, **arguments) for states in hidden]
    for hook in hooks:
        hook.remove()
    return outputs, grams
