"""Training in several processes, one on each GPU: which rows each has, and what they add up.

    join()                                   # in a rank of `stages.core.ranks`; nothing elsewhere
    rows = my_rows(ordered, batch_size)      # of every step
    loss = summed(loss, gradients)           # after the backward pass

Every process runs the same trainer, which knows nothing of the others: its gradients, losses and counts of
tokens become those of the whole step here. The adapter's gradients are 1 % of a model, so that adding them up
after the backward pass costs less than a thousandth of a step, and is the same operation every time.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from datasets import Dataset

from stages.core import ranks
from stages.core.ranks import count, rank
from stages.weights.hardware import device


def join() -> None:
    """Meet the other ranks where gradients are: on the GPUs, or on the CPU."""
    ranks.join("nccl" if device() == "cuda" else "gloo")


def my_share(batch_size: int) -> range:
    """Return which rows of every step are this rank's: as many as another's, or one more."""
    each, more = divmod(batch_size, count())
    start = rank() * each + min(rank(), more)
    return range(start, start + each + (rank() < more))


def my_rows(rows: Dataset, batch_size: int) -> Dataset:
    """Return this rank's rows of all steps, in their order."""
    if count() == 1:
        return rows
    share = my_share(batch_size)
    return rows.select([step + i for step in range(0, len(rows), batch_size) for i in share])


def total(value: torch.Tensor | float, greatest: bool = False) -> torch.Tensor:
    """Return the sum of a value over the ranks, or the greatest, as a tensor of its own."""
    kind = torch.float64 if isinstance(value, float) else None
    found = torch.as_tensor(value, dtype=kind, device=device()).detach().clone()
    if count() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX if greatest else dist.ReduceOp.SUM)
    return found


@torch.no_grad()
def summed(loss: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Add up the loss, which is returned, and the parameters' gradients, in place, over the ranks."""
    if count() == 1:
        return loss
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # in one piece: each operation costs as much as many kilobytes
    flat = torch.cat([loss.float().reshape(1), *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(flat)
    pieces = flat[1:].split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
    return flat[0].to(loss.dtype)


@torch.no_grad()
def start_alike(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give all ranks the first one's trainable weights."""
    if count() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)
