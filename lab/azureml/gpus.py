"""How many GPUs a job gets: those of its node, or as many of them as are asked for.

check(client, "gpu-cluster", 2)          # refused where the cluster's nodes have fewer
variables(2)                             # what lets the stages see these alone
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.core import azure
from stages.core.errors import UserError
from stages.core.machine import VISIBLE

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.ai.ml.entities import Compute


def check_nodes(nodes: int) -> None:
    """Raise `UserError` for a job on several nodes: no stage spans them."""
    if nodes > 1:
        raise UserError(
            f"--nodes is {nodes}, but a stage runs on one node: give it more GPUs (--gpus, on a cluster "
            "whose nodes have several), or each node an experiment (--sweep); docs/gpu.md says why"
        )


def check(client: MLClient, name: str, wanted: int) -> None:
    """Raise `UserError` where the nodes of a cluster have fewer GPUs; name those that have enough."""
    with azure.translate_errors():
        compute = client.compute.get(name)
        found = gpus_of(client, compute)
        if found is None:
            print(f"Not checked: Azure does not say how many GPUs a node of {name} has")
            return
        if found >= wanted:
            return
        others = [each for each in client.compute.list() if (gpus_of(client, each) or 0) >= wanted]
    there = ", ".join(each.name for each in others)
    advice = (
        f"choose with --compute one that has ({there})"
        if there
        else ("none here has as many: az ml compute create --size (docs/azure.md)")
    )
    has = f"{found or 'no'} GPU{'s' * (found != 1)} a node"
    raise UserError(f"compute {name} has {has} ({compute.size}), --gpus is {wanted}: {advice}")


def gpus_of(client: MLClient, compute: Compute) -> int | None:
    """Return how many GPUs a node of a cluster has; None where Azure does not say."""
    size = (getattr(compute, "size", None) or "").lower()
    sizes = client.compute.list_sizes(location=compute.location) if size else []
    return next((each.gpus for each in sizes if each.name.lower() == size), None)


def variables(wanted: int | None) -> dict[str, str]:
    """Return the environment in which the stages see as many GPUs; all of the node's if none is said."""
    return {VISIBLE: ",".join(map(str, range(wanted)))} if wanted else {}
