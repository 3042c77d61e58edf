"""Quantizing in several processes, one on each GPU: who does what, and how the parts come together.

    if is_mine(number): ...          # batches of the model's own text, decoder layers: dealt in turn
    text = combined(text)            # the whole, in every process
    collect(model.model.layers)      # the layers that the others packed, in the first process

A part is computed by one process alone, from the same inputs and in the same order as where there is no other
process. So the result is that of one, bit for bit. What is exchanged is little, and goes over the CPU.
"""

from __future__ import annotations

import torch
from torch import distributed, nn

from stages.core.ranks import count, rank


def is_mine(number: int) -> bool:
    """Say whether a batch or a layer is this process's."""
    return number % count() == rank()


def combined(part: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor of integers of which every process has a part, and zeros elsewhere."""
    if count() > 1:
        distributed.all_reduce(part)
    return part


def collect(layers: nn.ModuleList) -> None:
    """Bring the layers that the others have worked on to the first process."""
    for number in range(len(layers)):
        owner = number % count()
        if owner == 0:
            continue
        if rank() == owner:
            distributed.send_object_list([layers[number]], dst=0)
        elif rank() == 0:
            received = [None]
            distributed.recv_object_list(received, src=owner)
            layers[number] = received[0]
    if count() > 1:
        distributed.barrier()  # who ends before what he sent is read may take it along
