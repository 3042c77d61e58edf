"""What a paid endpoint would find out after minutes: name, role, quota, the version's gates; and the price.

Usages, sizes and permissions come from Azure Resource Manager itself: azure-ai-ml 1.35 loses half of each.
"""

from __future__ import annotations

import fnmatch
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.registry import download
from stages.core import azure
from stages.core.errors import UserError

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.ai.ml.entities import Model

ML_VERSION, ROLES_VERSION = "2024-04-01", "2022-04-01"  # of ARM's interfaces
ENDPOINTS = "Microsoft.MachineLearningServices/workspaces/onlineEndpoints"
# what making, asking and ending an endpoint takes
ACTIONS = [
    f"{ENDPOINTS}/write",
    f"{ENDPOINTS}/delete",
    f"{ENDPOINTS}/deployments/write",
    f"{ENDPOINTS}/deployments/delete",
    f"{ENDPOINTS}/score/action",
]
NAME = re.compile(r"[A-Za-z](-?[A-Za-z0-9]){2,31}")
SHORTEST, LONGEST = 3, 32
RESERVE = 1.2  # Azure ML keeps a fifth of a deployment free, for upgrades
PRICES = "https://azure.microsoft.com/pricing/details/machine-learning"


@dataclass(frozen=True)
class Machines:
    """What a deployment runs on, and what that costs."""

    kind: str
    count: int
    cores: int  # of one
    family: str
    price: float | None  # USD an hour for one, as Azure estimates it

    @property
    def cost(self) -> str:
        """Say what an hour costs, as far as Azure tells."""
        what = f"{self.count} x {self.kind}"
        if self.price is None:
            return f"{what}, at the price an hour of {PRICES}"
        return f"{what}, about {self.price * self.count:.2f} USD an hour (Azure's estimate)"


def check_name(name: str) -> None:
    """Raise `UserError` for a name that no endpoint can have."""
    if not NAME.fullmatch(name) or not SHORTEST <= len(name) <= LONGEST:
        raise UserError(
            f"{name} cannot name an endpoint ({len(name)} characters): {SHORTEST} to {LONGEST} letters, "
            "digits and single dashes, the first a letter: choose another with --endpoint"
        )


def check_version(client: MLClient, model: Model, force: bool) -> None:
    """Raise `UserError` for a version that failed its gates, or that `lab register` did not lay out."""
    which, tags = f"{model.name} version {model.version}", model.tags or {}
    if (despite := tags.get("registered_despite")) and not force:
        raise UserError(
            f"{which} was registered despite: {despite} (--force deploys it all the same)"
        )
    store, path = download.place_of(client, model, which)
    with azure.translate_errors():
        names = set(store.container.list_blob_names(name_starts_with=f"{path}/"))
    for file in ("onnx/genai_config.json", "onnx_adapter/adapter.onnx_adapter"):
        if f"{path}/{file}" not in names:
            raise UserError(f"{which} holds no {file}: lab register makes versions that do")


def check_role(client: MLClient, workspace: str) -> None:
    """Raise `UserError` unless this person may make, ask and end endpoints in the workspace."""
    scope = f"{workspace}/providers/Microsoft.Authorization/permissions"
    allowed = list(listed(scope, ROLES_VERSION))
    missing = [action for action in ACTIONS if not any(grants(each, action) for each in allowed)]
    if missing:
        lacks = ", ".join(
            action.removeprefix(f"{ENDPOINTS.rpartition('/')[0]}/") for action in missing
        )
        raise UserError(
            f"your roles on workspace {client.workspace_name} do not allow {lacks}: you need AzureML Data "
            "Scientist there (az role assignment create, docs/azure.md); a new role takes minutes"
        )


def grants(permission: dict[str, Any], action: str) -> bool:
    """Say whether one role's permissions allow an action."""

    def has(patterns: list[str] | None) -> bool:
        return any(fnmatch.fnmatch(action.lower(), each.lower()) for each in patterns or [])

    return has(permission.get("actions")) and not has(permission.get("notActions"))


def machines(client: MLClient, location: str, kind: str, count: int) -> Machines:
    """Return what Azure says of a machine. Raises `UserError` for one that the region does not have."""
    sizes = {size["name"].lower(): size for size in listed(of_region(client, location, "vmSizes"))}
    if kind.lower() not in sizes:
        alike = sorted(
            size["name"] for name, size in sizes.items() if name.startswith(kind[:11].lower())
        )
        there = f" (there: {', '.join(alike[:4])})" if alike else ""
        raise UserError(f"{location} has no machine {kind}{there}: choose one with --instance-type")
    size = sizes[kind.lower()]
    found = size.get("estimatedVMPrices") or {}
    hourly = found.get("billingCurrency") == "USD" and found.get("unitOfMeasure") == "OneHour"
    prices = [
        each["retailPrice"]
        for each in found.get("values", [])
        if hourly and (each["osType"], each["vmTier"]) == ("Linux", "Standard")
    ]
    return Machines(
        size["name"], count, size["vCPUs"], size["family"], prices[0] if prices else None
    )


def check_quota(client: MLClient, location: str, wanted: Machines) -> None:
    """Raise `UserError` where a deployment's cores, and those that Azure keeps in reserve, are not left."""
    family = plain(wanted.family)
    usages = [
        each
        for each in listed(of_region(client, location, "usages"))
        if re.match(rf"{family}(cluster|$)", plain(each["name"]["value"]))
    ]
    if not usages:
        print(f"Not checked: Azure lists no quota of {wanted.family} in {location}")
        return
    needed = math.ceil(RESERVE * wanted.count) * wanted.cores
    left = min(each["limit"] - each["currentValue"] for each in usages)
    if left < needed:
        raise UserError(
            f"no quota: {wanted.count} x {wanted.kind} needs {needed} cores of {wanted.family} in "
            f"{location}, with the fifth that Azure ML reserves for upgrades, and {max(left, 0)} are left: "
            "ask for more in Azure ML studio (Quota), or choose another --instance-type"
        )


def plain(name: str) -> str:
    """Return a family's name as sizes and usages both have it: they differ in spaces and dashes."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def of_region(client: MLClient, location: str, what: str) -> str:
    """Return the address of what Azure ML has in a region."""
    provider = "providers/Microsoft.MachineLearningServices"
    return f"/subscriptions/{client.subscription_id}/{provider}/locations/{location}/{what}"


def listed(address: str, version: str = ML_VERSION) -> list[dict[str, Any]]:
    """Return what Azure Resource Manager lists at an address, all pages of it."""
    from azure.core import PipelineClient
    from azure.core.pipeline.policies import BearerTokenCredentialPolicy, RetryPolicy
    from azure.core.rest import HttpRequest

    tries = RetryPolicy(retry_total=azure.OPTIONS["retry_total"])
    login = BearerTokenCredentialPolicy(azure.credential(), f"{azure.ARM}/.default")
    found, page = [], f"{azure.ARM}{address}?api-version={version}"
    with azure.translate_errors(), PipelineClient(azure.ARM, policies=[tries, login]) as arm:
        while page:
            answer = arm.send_request(
                HttpRequest("GET", page), connection_timeout=azure.CONNECT["connection_timeout"]
            )
            answer.raise_for_status()
            found += answer.json()["value"]
            page = answer.json().get("nextLink")
    return found
