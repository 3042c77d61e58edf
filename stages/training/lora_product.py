"""A LoRA-adapted linear as one differentiable product: y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ, for PEFT's layers.

    fuse_products(lora_config)       # before PEFT puts its layers into a model

PEFT spells the sum out in six operations, whose intermediate results all travel through memory and wait
for Python to launch them: on an H100 that is half of a training step. LoRA: arXiv:2106.09685.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch.nn.functional import linear

from stages.weights.packed import PackedLinear


def fuse_products(config: LoraConfig) -> None:
    """Let every linear that PEFT adapts compute its product at once. Saved adapters are the same.

    By PEFT's own way to bring other layers (docs/peft/developer_guides/custom_models), which it calls
    experimental. Layers with dropout stay PEFT's: it stands between x and A, where the sum cannot be fused.
    """
    if not config.lora_dropout:
        config._register_custom_module({torch.nn.Linear: FusedLinear})


class FusedLinear(PeftLinear):
    """PEFT's layer around one adapter called default, with `_LoraProduct` for its product."""

    def forward(self, inputs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return the adapted product, [..., out], in the base weight's dtype."""
        down, up = self.lora_A["default"].weight, self.lora_B["default"].weight
        return _LoraProduct.apply(inputs, down, up, self.base_layer, self.scaling["default"])


class _LoraProduct(torch.autograd.Function):
    """Products in the base's dtype; a packed base is dequantized again for the backward pass."""

    @staticmethod
    def forward(context, inputs, down, up, base, scaling):
        rows = inputs.reshape(-1, inputs.shape[-1]).to(base.weight.dtype)
        narrow_down, narrow_up = down.to(rows.dtype), up.to(rows.dtype)
        hidden = rows @ narrow_down.T  # x·Aᵀ, [rows, rank]: small, and kept for the backward pass
        output = linear(rows, weight_of(base), base.bias).addmm_(hidden, narrow_up.T, alpha=scaling)
        context.save_for_backward(rows, hidden, narrow_down, narrow_up)
        context.base, context.scaling = base, scaling
        context.shape, context.dtype = inputs.shape, inputs.dtype
        return output.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(context, gradient):
        rows, hidden, down, up = context.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1]).to(rows.dtype)
        # with y = x·Wᵀ + s·h·Bᵀ and h = x·Aᵀ: dh = s·dy·B, dB = s·dyᵀ·h, dA = dhᵀ·x, dx = dy·W + dh·A
        hidden_gradient = (gradient @ up).mul_(context.scaling)
        up_gradient = (gradient.T @ hidden).float().mul_(context.scaling)
        down_gradient = (hidden_gradient.T @ rows).float()
        inputs_gradient = None
        if context.needs_input_grad[
            0
        ]:  # not at the first layer, whose input nothing is learned from
            inputs_gradient = (gradient @ weight_of(context.base)).addmm_(hidden_gradient, down)
            inputs_gradient = inputs_gradient.view(*context.shape).to(context.dtype)
        return inputs_gradient, down_gradient, up_gradient, None, None


def weight_of(base: torch.nn.Linear) -> torch.Tensor:
    """Return the frozen weight, [out, in]."""
    return base.dequantized() if isinstance(base, PackedLinear) else base.weight
