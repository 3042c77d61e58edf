"""Where activation-aware scales can be folded, for each family of decoder layers.

A scale on the input channels of some linears is undone in the module that produces that input: a norm
or another linear. This table is all that AWQ has to know about a family.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from stages.core.settings import Quantize
from stages.weights.families import FAMILIES


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read the same input, and the module that produces it.

    Without a producer they read what other modules read too, and take no scales. Of a fused linear
    producer, only the output rows from `first_row` on make the input. Each of them feeds `repeat` input
    channels: grouped-query attention repeats every value head. A norm multiplies by weight + `offset`.
    """

    consumers: tuple[nn.Linear, ...]
    producer: nn.Module | None
    first_row: int = 0
    repeat: int = 1
    head_dim: int = 1
    offset: float = 0.0

    def spread(self, channels: torch.Tensor) -> torch.Tensor:
        """Repeat one value per produced channel, [produced], over the input channels, [in]."""
        heads = channels.view(-1, self.head_dim)
        return heads.repeat_interleave(self.repeat, dim=0).flatten()

    def gather(self, channels: torch.Tensor) -> torch.Tensor:
        """Average one value per input channel, [in], over the channels it is repeated to, [produced]."""
        heads = channels.view(-1, self.repeat, self.head_dim)
        return heads.mean(dim=1).flatten()

    @torch.no_grad()
    def fold(self, scales: torch.Tensor) -> None:
        """Multiply the consumers' input channels by `scales`, [produced], and divide the producer."""
        if self.producer is None:
            raise ValueError("nothing can undo scales on the inputs of these linears")
        for linear in self.consumers:
            linear.weight.mul_(self.spread(scales).to(linear.weight.dtype))
        # x·(s) / s: whatever the producer gives arrives divided, and the consumers multiply it back. A norm's
        # weight is a vector, a linear's a matrix whose rows are its outputs
        weight = self.producer.weight[self.first_row :]
        weight.add_(self.offset).div_(scales.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1)))
        weight.sub_(self.offset)
        if getattr(self.producer, "bias", None) is not None:
            self.producer.bias[self.first_row :].div_(scales.to(weight.dtype))


def projections(config: PretrainedConfig) -> dict[str, str]:
    """Return the linears of a decoder layer by name, with the block that holds each."""
    fused = FAMILIES[config.model_type].fused
    attention = ["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"]
    gates = ["gate_up_proj"] if fused else ["gate_proj", "up_proj"]
    blocks = {"self_attn": [*attention, "o_proj"], "mlp": [*gates, "down_proj"]}
    return {name: block for block, names in blocks.items() for name in names}


def linear_groups(layer: nn.Module, config: PretrainedConfig) -> list[LinearGroup]:
    """Return the groups of one decoder layer in forward order."""
    attention, mlp = layer.self_attn, layer.mlp
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    repeat = config.num_attention_heads // config.num_key_value_heads
    inputs: tuple[nn.Linear, ...]
    gates: tuple[nn.Linear, ...]
    if hasattr(attention, "qkv_proj"):  # Phi-3: fused projections
        inputs, value = (attention.qkv_proj,), attention.qkv_proj
        gates, up = (mlp.gate_up_proj,), mlp.gate_up_proj
        # q, k and v lie in one matrix, v last; o reads what attention makes of v alone
        first_value = value.out_features - config.num_key_value_heads * head_dim
        first_up = config.intermediate_size
    else:
        inputs, value = (attention.q_proj, attention.k_proj, attention.v_proj), attention.v_proj
        gates, up = (mlp.gate_proj, mlp.up_proj), mlp.up_proj
        first_value = first_up = 0
    # OLMo 2 norms what a block gives, not what it reads: that is the sum of all layers before
    before_attention = getattr(layer, "input_layernorm", None)
    # Gemma norms both, and there the norm called post_attention is on what attention gives
    if hasattr(layer, "post_feedforward_layernorm"):
        before_mlp = getattr(layer, "pre_feedforward_layernorm", None)
    else:
        before_mlp = layer.post_attention_layernorm
    offset = FAMILIES[config.model_type].norm_offset
    return [
        LinearGroup(inputs, before_attention, offset=offset),
        # attention mixes tokens, not channels: a scale on a channel of v arrives at o unchanged
        LinearGroup((attention.o_proj,), value, first_value, repeat, head_dim),
        LinearGroup(gates, before_mlp, offset=offset),
        # down reads act(gate)·up, which is linear in up, and not in gate
        LinearGroup((mlp.down_proj,), up, first_up),
    ]


def bits_by_module(options: Quantize, config: PretrainedConfig) -> dict[str, int]:
    """Return the bits, by name, of the modules that do not follow quantize.bits."""
    bits: dict[str, int] = {
        "lm_head": options.lm_head_bits,
        "model.embed_tokens": options.embedding_bits,
    }
    for module in options.eight_bit_modules:
        for layer in range(config.num_hidden_layers):
            bits[f"model.layers.{layer}.{projections(config)[module]}.{module}"] = 8
    return bits
