"""`compensation.try_ranges` and `round_columns` as Triton kernels: one program does all of some rows.

A tile, [size, TILE], stays in registers from the first column, or range, to the last. So a group costs one
launch and two writes of memory, where plain torch launches ten kernels for each and reads the block again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stages.quantization.scale_search import Grid

TILE = 32  # rows of the weight to a program: with 128 columns, 32 registers a thread
# float32 keeps no fraction beside it: rounds as torch does
HALF_TO_EVEN = tl.constexpr(1.5 * 2**23)


@triton.jit
def round_tile(  # type: ignore[no-untyped-def]  # Triton reads pointers and constants, no types
    block,
    factor,
    step,
    zero,
    rounded,
    error,
    rows,
    top,
    SIZE: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    """Round the columns of TILE rows of block, [SIZE, rows]; write them and their errors."""
    column = tl.arange(0, SIZE)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    values = tl.load(block + column[:, None] * rows + row[None, :], mask=inside[None, :], other=0.0)
    steps = tl.load(step + row, mask=inside, other=1.0)
    zeros = tl.load(zero + row, mask=inside, other=0.0)
    for j in range(SIZE):
        value = tl.sum(tl.where(column[:, None] == j, values, 0.0), axis=0)
        integer = (tl.div_rn(value, steps) + zeros + HALF_TO_EVEN) - HALF_TO_EVEN
        nearest = (tl.minimum(tl.maximum(integer, 0.0), top) - zeros) * steps
        missed = tl.div_rn(value - nearest, tl.load(factor + j * SIZE + j))
        # the factor is upper triangular: columns before j get nothing
        values -= tl.load(factor + j * SIZE + column)[:, None] * missed[None, :]
        tl.store(rounded + j * rows + row, nearest, mask=inside)
        tl.store(error + j * rows + row, missed, mask=inside)


def round_columns_at_once(
    block: torch.Tensor, upper: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one group rounded and its errors, [size, rows] both; float32 on CUDA, size a power of two."""
    size, rows = block.shape
    block, upper = block.contiguous(), upper.contiguous()  # a factor's columns lie together
    rounded, error = torch.empty_like(block), torch.empty_like(block)
    round_tile[(triton.cdiv(rows, TILE),)](
        block, upper, step, zero, rounded, error, rows, float(top), SIZE=size, TILE=TILE
    )
    return rounded, error


@triton.jit
def best_range_of_tile(  # type: ignore[no-untyped-def]
    block,
    cost,
    shrinks,
    step,
    zero,
    rows,
    top,
    middle,
    COUNT: tl.constexpr,  # noqa: N803
    SYMMETRIC: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    """Try COUNT ranges, shrinks [COUNT, 2], on TILE rows of block, [SIZE, rows]; write the best of each."""
    column = tl.arange(0, SIZE)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    values = tl.load(block + column[:, None] * rows + row[None, :], mask=inside[None, :], other=0.0)
    costs = tl.load(cost + column)[:, None]
    lowest, highest = tl.min(values, axis=0), tl.max(values, axis=0)
    least = tl.full([TILE], float("inf"), tl.float32)
    best_step, best_zero = tl.full([TILE], 1e-12, tl.float32), tl.zeros([TILE], tl.float32)
    for j in range(COUNT):
        low = tl.minimum(lowest * tl.load(shrinks + 2 * j), 0.0)
        high = tl.maximum(highest * tl.load(shrinks + 2 * j + 1), 0.0)
        if SYMMETRIC:
            high = tl.maximum(high, -low)
            low = tl.where(low < 0, -high, low)
        steps = tl.maximum(tl.div_rn(high - low, top), 1e-12)
        if SYMMETRIC:
            zeros = tl.zeros([TILE], tl.float32) + middle
        else:
            zeros = (tl.div_rn(-low, steps) + HALF_TO_EVEN) - HALF_TO_EVEN
        scaled = tl.div_rn(values, steps[None, :]) + zeros[None, :]
        integers = tl.minimum(tl.maximum((scaled + HALF_TO_EVEN) - HALF_TO_EVEN, 0.0), top)
        missed = (integers - zeros[None, :]) * steps[None, :] - values
        error = tl.sum(missed * missed * costs, axis=0)
        better = error < least
        least = tl.where(better, error, least)
        best_step = tl.where(better, steps, best_step)
        best_zero = tl.where(better, zeros, best_zero)
    tl.store(step + row, best_step, mask=inside)
    tl.store(zero + row, best_zero, mask=inside)


def find_range_at_once(
    block: torch.Tensor, cost: torch.Tensor, grid: Grid, shrinks: list[tuple[float, float]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return step and zero point, [rows] each, of one group, [size, rows]; cost, [size, 1]."""
    size, rows = block.shape
    block, cost = block.contiguous(), cost.contiguous()
    tried = torch.tensor(shrinks, dtype=torch.float32, device=block.device)
    step, zero = torch.empty_like(block[0]), torch.empty_like(block[0])
    best_range_of_tile[(triton.cdiv(rows, TILE),)](
        block,
        cost,
        tried,
        step,
        zero,
        rows,
        float(grid.top),
        float(2 ** (grid.bits - 1)),
        COUNT=len(shrinks),
        SYMMETRIC=grid.symmetric,
        SIZE=size,
        TILE=TILE,
    )
    return step, zero
