"""Linears that stay packed while they are trained through."""

from __future__ import annotations

import torch
from olive.common.quant.utils import WeightQuantizer


class PackedLinear(torch.nn.Linear):
    """A frozen linear that keeps its 4-bit weight and dequantizes it for every product.

    It is a `torch.nn.Linear` so that PEFT adapts it, without the weight that such a module has.
    """

    def __init__(
        self,
        quantizer: WeightQuantizer,
        dtype: torch.dtype,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        qzeros: torch.Tensor | None,
        bias: torch.Tensor | None,
    ):
        torch.nn.Module.__init__(self)
        self.quantizer, self.dtype = quantizer, dtype
        self.out_features = qweight.shape[0]
        self.in_features = qweight.shape[1] * 8 // quantizer.bits
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales.to(dtype))
        self.register_buffer("qzeros", qzeros)
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    @property
    def weight(self) -> torch.Tensor:
        """Tell PEFT the dtype and device that it asks a weight for; there are no values in it."""
        return torch.empty(0, dtype=self.dtype, device=self.qweight.device)

    def dequantized(self) -> torch.Tensor:
        """Return the weight, [out, in], in the training dtype."""
        groups = self.scales.shape[1]
        integers = unpack(self.qweight, self.quantizer.bits).view(self.out_features, groups, -1)
        if self.qzeros is None:
            zeros = self.quantizer.midq
        else:
            zeros = unpack(self.qzeros, self.quantizer.bits)[:, :groups, None]
        weight = (integers.to(self.dtype) - zeros) * self.scales[..., None]
        return weight.view(self.out_features, self.in_features)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs·Wᵀ + bias, [..., out]."""
        return _PackedProduct.apply(inputs.to(self.dtype), self)


class _PackedProduct(torch.autograd.Function):
    """A product with a packed weight that is dequantized again, not kept, for the backward pass."""

    @staticmethod
    def forward(context, inputs, linear):
        context.linear = linear  # not its float weight: memory is what packing is for
        return torch.nn.functional.linear(inputs, linear.dequantized(), linear.bias)

    @staticmethod
    def backward(context, gradient):
        return gradient.to(context.linear.dtype) @ context.linear.dequantized(), None


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the integers of uint8 rows that hold 8/bits each, lowest bits first."""
    if bits == 8:
        return packed
    # two integers a byte, the lower half first, as Olive writes them
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
