"""`compensation.round_columns` as a Triton kernel: one program rounds all columns of some rows.

A tile, [size, TILE], stays in registers from its first column to its last. So a group costs one launch and
two writes of memory, where plain torch launches eight kernels for each column and reads the block again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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
