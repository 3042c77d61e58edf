"""The mathematics of AWQ, judged by Gram matrices: no candidate is ever run through the model.

AWQ (Lin et al. 2023, arXiv:2306.00978) scales the input channels of a linear before rounding, so that
channels with large activations lose less. For inputs X, [tokens, in],
and a rounding error D of the weight, [out, in], the error of the output is

    |X Dᵀ|² = tr(D H Dᵀ)    with the Gram matrix H = XᵀX, [in, in],

so one pass over the calibration set gives all that the search needs, whatever the number of candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from stages.weights.hardware import fast_dtype

Mapping = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Grid:
    """The 4-bit (or 8-bit) grid that Olive's `WeightQuantizer` rounds to, in few passes over memory.

    The search rounds every weight dozens of times; Olive's rounding goes through int32 and takes
    thirty times longer. A test holds the two equal.
    """

    bits: int
    symmetric: bool
    group_size: int

    @property
    def top(self) -> int:
        """Return the largest integer."""
        return 2**self.bits - 1

    def range(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return step and zero point of the grid that spans low to high, and 0; any shape."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = torch.where(low < 0, -high, low)
        step = ((high - low) / self.top).clamp_(
            min=1e-12
        )  # a group of zeros has no range to divide by
        middle = torch.full_like(step, 2 ** (self.bits - 1))
        return step, middle if self.symmetric else (-low / step).round_()

    def round_to(
        self, weight: torch.Tensor, step: torch.Tensor, zero: torch.Tensor
    ) -> torch.Tensor:
        """Return weights rounded to a grid, in a new tensor."""
        integers = (weight / step).add_(zero).round_().clamp_(0, self.top)
        return integers.sub_(zero).mul_(step)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight, [out, in], rounded to its own grid, group by group."""
        groups = weight.view(weight.shape[0], -1, self.group_size)
        grid = self.range(groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True))
        return self.round_to(groups, *grid).view_as(weight)


def output_error(error: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return tr(D H Dᵀ) for a weight error D, [out, in], and a Gram matrix H, [in, in].

    The product runs in the Gram matrix's dtype, the sum in float32. In bfloat16 the result is off by parts
    in ten thousand, alike for all candidates: enough to rank them, where hardware multiplies it fast.
    """
    error = error.to(gram.dtype)
    return (error @ gram).mul_(error).sum(dtype=torch.float32)


def search_scales(
    weights: list[torch.Tensor],
    gram: torch.Tensor,
    grid: Grid,
    steps: int,
    tie: Mapping = lambda channels: channels,
    spread: Mapping = lambda channels: channels,
) -> torch.Tensor:
    """Return the input-channel scales, [produced], under which the weights round with least error.

    Candidates are x^a and x^a / w^(1-a), with the inputs' root mean square x and the weights' mean
    relative magnitude w per channel, for `steps` exponents a; a = 0 of the first kind, which changes
    nothing, is among them. `tie` and `spread` map [in] to [produced] and back (`LinearGroup`).
    """
    inputs = tie(gram.diagonal()).clamp(min=1e-12).sqrt()
    magnitudes = tie(relative_magnitude(weights, grid.group_size)).clamp(min=1e-4)
    fast_gram = gram.to(fast_dtype())
    weights = [some_rows(weight) for weight in weights]
    best_error, best = None, torch.ones_like(inputs)
    for step in range(steps):
        exponent = step / steps
        # by the inputs alone, and by inputs against weights: which is better differs from layer to layer
        for other in (1.0, magnitudes.pow(1 - exponent)):
            scales = centred(inputs.pow(exponent) / other)
            error = sum(scaled_error(w, fast_gram, spread(scales), grid) for w in weights)
            if torch.isfinite(error) and (best_error is None or error < best_error):
                best_error, best = error, scales
    return best


def some_rows(weight: torch.Tensor, count: int = 256) -> torch.Tensor:
    """Return about `count` rows of a weight, evenly spread: enough to rank candidates."""
    return weight[:: max(1, weight.shape[0] // count)]


def scaled_error(
    weight: torch.Tensor, gram: torch.Tensor, scales: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return the output error of a weight, [out, in], that is rounded after scaling its inputs."""
    scaled = weight * scales
    return output_error(grid.round(scaled).sub_(scaled).div_(scales), gram)


def relative_magnitude(weights: list[torch.Tensor], group_size: int) -> torch.Tensor:
    """Return per input channel, [in], the mean of |weight| relative to the largest of its group."""
    stacked = torch.cat(weights).abs()
    groups = stacked.view(stacked.shape[0], -1, group_size)
    relative = groups / groups.amax(dim=-1, keepdim=True).clamp(min=1e-12)
    return relative.view_as(stacked).mean(dim=0)


def centred(scales: torch.Tensor) -> torch.Tensor:
    """Divide scales by the geometric middle of their range, so that folding stays near 1."""
    scales = scales.clamp(min=1e-4)
    # only the ratios of scales matter to rounding; around 1, folding overflows no float16 norm
    return scales / (scales.max() * scales.min()).sqrt()
