"""Managed online endpoints as Azure Resource Manager has them, and what their containers answer.

    cloud.service.endpoints.containers["v2-1a2b3c4d"] = Container(fails="User container has crashed")

An operation takes a few polls, as the SDK does them. What a container says is a function, which a test may
replace, or nodes.py, by one that asks a real server.
"""

from __future__ import annotations

import threading
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .service import (
    HOME,
    PROVIDER,
    REGION,
    SUBSCRIPTION,
    Answer,
    Service,
    error,
    route,
)

PLACE = f"/subscriptions/{SUBSCRIPTION}{PROVIDER}/locations/{REGION}"
ENDPOINTS = f"{HOME}/onlineEndpoints"
LATER = {"Retry-After-Ms": "10"}  # Azure says seconds
SIZES = [
    {"name": "Standard_DS3_v2", "family": "standardDSv2Family", "vCPUs": 4, "gpus": 0,
     "estimatedVMPrices": {
         "billingCurrency": "USD", "unitOfMeasure": "OneHour",
         "values": [
             {"retailPrice": 0.5, "osType": "Windows", "vmTier": "Standard"},
             {"retailPrice": 0.25, "osType": "Linux", "vmTier": "Standard"},
             {"retailPrice": 0.05, "osType": "Linux", "vmTier": "Spot"},
         ]}},
    {"name": "Standard_DS4_v2", "family": "standardDSv2Family", "vCPUs": 8, "gpus": 0},
    {"name": "Standard_F4s_v2", "family": "standardFSv2Family", "vCPUs": 4, "gpus": 0},
    {"name": "Standard_NC24ads_A100_v4", "family": "StandardNCADSA100v4Family", "vCPUs": 24, "gpus": 1},
    {"name": "Standard_NC48ads_A100_v4", "family": "StandardNCADSA100v4Family", "vCPUs": 48, "gpus": 2},
]  # fmt: skip
SCIENTIST = {
    "actions": [
        "Microsoft.MachineLearningServices/workspaces/*/read",
        "Microsoft.MachineLearningServices/workspaces/*/action",
        "Microsoft.MachineLearningServices/workspaces/*/delete",
        "Microsoft.MachineLearningServices/workspaces/*/write",
    ],
    "notActions": [
        "Microsoft.MachineLearningServices/workspaces/delete",
        "Microsoft.MachineLearningServices/workspaces/write",
        "Microsoft.MachineLearningServices/workspaces/computes/*/write",
    ],
}
READER = {"actions": ["*/read"], "notActions": []}


def says(text: str) -> Callable[[dict], Answer]:
    """Return a container's answer to every question."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return lambda body: (200, {"object": "chat.completion", "choices": [choice]})


@dataclass
class Container:
    """What becomes of a deployment."""

    fails: str = ""  # Azure's words for why it does not come up
    log: str = ""
    answer: Callable[[dict], Answer] = field(default_factory=lambda: says("In Illinois."))


@dataclass
class Operation:
    """What takes a while."""

    polls: int
    end: Callable[[], str]  # does it; returns why it failed


@dataclass
class Endpoints:
    """What a test may look at or break."""

    polls: int = 2
    start: Callable[[dict], None] = lambda resource: None  # before a container is up
    stuck: threading.Event = field(default_factory=threading.Event)  # set: nothing ends
    asked: list[str] = field(default_factory=list)  # deployments that were asked
    containers: dict[str, Container] = field(default_factory=lambda: defaultdict(Container))
    roles: list[dict] = field(default_factory=list)
    cores: dict[str, tuple[int, int]] = field(default_factory=dict)  # family: in use, limit
    operations: dict[str, Operation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Become as an administrator leaves it."""
        self.polls, self.start = 2, lambda resource: None
        self.stuck.clear()
        for state in (self.asked, self.containers, self.operations):
            state.clear()
        self.roles = [SCIENTIST]
        self.cores = {
            "Total Cluster Dedicated Regional": (0, 100),
            "Standard DSv2 Family Cluster Dedicated": (0, 24),
        }

    def begin(self, end: Callable[[], str]) -> dict[str, str]:
        """Begin what takes a while; return the headers that say where to look after it."""
        number = str(uuid.uuid4())
        self.operations[number] = Operation(self.polls, end)
        where = f"https://management.azure.com{PLACE}/mfeOperationsStatus/od:{number}"
        return {"Azure-AsyncOperation": where, **LATER}


@route("GET", rf"{PLACE}/mfeOperationsStatus/od:([^/]+)")
def operation(service: Service, body: Any, number: str) -> Answer:
    found = service.endpoints.operations[number]
    if service.endpoints.stuck.is_set() or found.polls > 0:
        found.polls -= 1
        return 200, {"status": "InProgress"}, LATER
    if why := found.end():
        return 200, {"status": "Failed", **error("BadRequest", why)}
    return 200, {"status": "Succeeded"}


@route("PUT", rf"{ENDPOINTS}/([^/]+)")
def put_endpoint(service: Service, body: dict, name: str) -> Answer:
    """Make an endpoint, or move its traffic: at once, and only to what is there."""
    path = f"{ENDPOINTS}/{name}"
    there = {each["name"] for each in service.children(f"{path}/deployments")}
    traffic = body["properties"].get("traffic") or {}
    if strange := set(traffic) - there:
        return 400, error("BadRequest", f"there is no deployment {', '.join(strange)}")
    known = path.lower() in service.resources
    uri = f"https://{name}.{REGION}.inference.ml.azure.com/v1/chat/completions"
    own = {"provisioningState": "Succeeded", "scoringUri": uri, "traffic": traffic}
    properties = {"properties": {}, **body["properties"], **own}
    more = {key: body[key] for key in ("tags", "identity", "location")}
    return 200 if known else 201, service.put(path, properties, **more)


@route("PUT", rf"{ENDPOINTS}/([^/]+)/deployments/([^/]+)")
def put_deployment(service: Service, body: dict, endpoint: str, name: str) -> Answer:
    path = f"{ENDPOINTS}/{endpoint}/deployments/{name}"
    if path.lower() in service.resources:
        return 409, error("Conflict", f"{name} is there, and cannot be changed while it is")
    filled_in = {"properties": {}, "scaleSettings": {"scaleType": "Default"}}
    properties = {**filled_in, **body["properties"], "provisioningState": "Creating"}
    more = {key: body[key] for key in ("tags", "sku", "location")}
    resource = service.put(path, properties, **more)

    def end() -> str:
        container = service.endpoints.containers[name]
        if not container.fails:
            service.endpoints.start(resource)
        resource["properties"]["provisioningState"] = "Failed" if container.fails else "Succeeded"
        return container.fails

    return 201, resource, service.endpoints.begin(end)


@route("DELETE", rf"{ENDPOINTS}/(.+)")
def delete(service: Service, body: Any, what: str) -> Answer:
    path = f"{ENDPOINTS}/{what}".lower()
    if path not in service.resources:
        return 204, None
    _, _, name = what.partition("/deployments/")
    owner = service.resources[f"{ENDPOINTS}/{what.split('/')[0]}".lower()]
    if name and owner["properties"]["traffic"].get(name):
        return 409, error("Conflict", f"{name} has traffic")

    def end() -> str:
        for each in [each for each in service.resources if f"{each}/".startswith(f"{path}/")]:
            del service.resources[each]
        return ""

    return 202, None, service.endpoints.begin(end)


@route("POST", rf"{ENDPOINTS}/([^/]+)/deployments/([^/]+)/getLogs")
def logs(service: Service, body: dict, endpoint: str, name: str) -> Answer:
    lines = service.endpoints.containers[name].log.splitlines()
    asked_for = body["containerType"] == "InferenceServer"
    return 200, {"content": "\n".join(lines[-body["tail"] :]) if asked_for else ""}


@route("POST", r"/v1/chat/completions")
def score(service: Service, body: dict) -> Answer:
    """Answer as an endpoint does: by traffic, or by the deployment that a header names."""
    headers = service.request.headers
    if not headers.get("Authorization", "").startswith("Bearer "):
        return 401, error("Unauthorized", "no token")
    endpoint = service.resources[f"{ENDPOINTS}/{headers['Host'].split('.')[0]}".lower()]
    shares = endpoint["properties"]["traffic"]
    name = headers.get("azureml-model-deployment") or max(shares, key=shares.get)
    service.endpoints.asked.append(name)
    return service.endpoints.containers[name].answer(body)


@route("GET", rf"{PLACE}/vmSizes")
def sizes(service: Service, body: Any) -> Answer:
    return 200, {"value": SIZES}


@route("GET", rf"{PLACE}/usages")
def usages(service: Service, body: Any) -> Answer:
    """Return the families' cores, a page each."""
    names = list(service.endpoints.cores.items())
    value = [
        {
            "name": {"value": f"{family} vCPUs"},
            "currentValue": used,
            "limit": limit,
            "unit": "Count",
        }
        for family, (used, limit) in names
    ]
    return 200, {"value": value}


@route("GET", rf"{HOME}/providers/Microsoft\.Authorization/permissions")
def permissions(service: Service, body: Any) -> Answer:
    return 200, {"value": service.endpoints.roles}
