"""Tuning of what is not an integer: group scales and norms, by the float model's own predictions.

    tune(model, teacher, tokens, steps=24)      # packed in place; its integers stay as they are

Rounding is judged layer by layer, and errors of one layer meet those of the others only in the prediction.
So the scales s·exp(δ) of every group and the gains of every norm follow the gradient of the Kullback-Leibler
divergence KL(teacher | model) of the next token, on the calibration text (EfficientQAT, arXiv:2407.11062, its
second phase). They are few, and start where rounding has left them: a few dozen steps are enough.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from olive.common.quant.nn import QuantLinear
from olive.common.quant.utils import unpack_from_uint8
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import kl_div, linear, log_softmax

from stages.core import live
from stages.weights.hardware import device, fast_dtype

BATCH = 4096  # tokens to a step: with fewer the last steps follow their luck
RATE = 1e-3  # of the first step, falling to 0: δ's, so a thousandth of a scale


class TunableLinear(nn.Module):
    """A packed linear whose scales take a gradient."""

    def __init__(self, packed: QuantLinear):
        super().__init__()
        self.packed = packed
        self.change = nn.Parameter(torch.zeros_like(packed.scales))
        bits, scales = packed.quantizer.bits, packed.scales
        integers = unpack_from_uint8(packed.qweight, bits, (packed.rows, packed.cols)).int()
        if packed.qzeros is None:
            zeros = torch.full_like(scales, packed.quantizer.midq, dtype=torch.int32)
        else:
            zeros = unpack_from_uint8(packed.qzeros, bits, scales.shape).int()
        groups = integers.view(*scales.shape, -1) - zeros[..., None]
        self.register_buffer("integers", groups.to(torch.int16))  # 8 bits and a sign

    def scales(self) -> torch.Tensor:
        """Return the scales as they are now, [out, groups]."""
        return self.packed.scales * self.change.exp()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs·Wᵀ + bias."""
        weight = (self.integers * self.scales()[..., None]).flatten(1)
        return linear(inputs, weight, self.packed.bias)


def tune(model: nn.Module, teacher: nn.Module, tokens: torch.Tensor, steps: int) -> None:
    """Tune a model whose layers are packed, in place; tokens, [sequences, length]."""
    model.requires_grad_(False).to(device())
    linears = tunable(model)
    norms = [gain for name, gain in model.named_parameters() if "norm" in name.split(".")[-2]]
    parameters = [*(each.change for each in linears.values()), *norms]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.95))
    batches = live.steps(batches_of(tokens, steps), "tuning", "step", steps)
    for number, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = RATE * (1 - number / steps)
        optimizer.zero_grad()
        with torch.enable_grad():
            divergence(model, teacher, batch.to(device())).backward()
        optimizer.step()
    for name, each in linears.items():
        each.packed.scales.copy_(each.scales())
        model.set_submodule(name, each.packed)
    model.requires_grad_(False).to("cpu")


def tunable(model: nn.Module) -> dict[str, TunableLinear]:
    """Replace packed linears by ones that can be tuned; return those by name."""
    packed = {name: part for name, part in model.named_modules() if isinstance(part, QuantLinear)}
    linears = {name: TunableLinear(part) for name, part in packed.items()}
    for name, each in linears.items():
        model.set_submodule(name, each)
    return linears


def batches_of(tokens: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Yield `steps` batches of BATCH tokens; every sequence has its turn before one comes again."""
    count = min(len(tokens), max(1, BATCH // tokens.shape[1]))
    order, generator = torch.empty(0, dtype=torch.int64), torch.Generator().manual_seed(0)
    for _ in range(steps):
        if len(order) < count:
            order = torch.randperm(len(tokens), generator=generator)
        yield tokens[order[:count]]
        order = order[count:]


def divergence(model: nn.Module, teacher: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(teacher | model) of the next token, in nats."""
    dtype = fast_dtype()
    # the attention that sums in the same order every time, backwards too
    fast = torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32)
    with fast, sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():
            expected = log_softmax(teacher(tokens, use_cache=False).logits.float(), dim=-1)
        found = log_softmax(model(tokens, use_cache=False).logits.float(), dim=-1)
    return kl_div(
        found.flatten(0, 1), expected.flatten(0, 1), log_target=True, reduction="batchmean"
    )
