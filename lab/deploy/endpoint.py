"""A managed online endpoint, and its deployments: one a version, of which one answers.

endpoint → deployment without traffic → a real question → traffic → what neither answers nor is kept goes

Every step looks first at what is there, so that the same command goes on where an earlier one was killed.
Which deployment answered before stands in a tag of the endpoint, for `--rollback`.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core import azure
from stages.core.errors import UserError

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.ai.ml.entities import Model, OnlineDeployment, OnlineEndpoint

CONTENT, PREVIOUS, MADE_BY = "lab_content", "lab_previous", "lab_deploy"  # tags
PORT = 8000
MOUNT = "/var/model"
LONGEST_ANSWER = 180_000  # ms: the most that Azure ML allows
QUESTION = "Where is Chicago?"
MOVING = ("creating", "updating", "scaling", "deleting", "provisioning")  # states that pass
POLL = 5.0  # seconds
LINES = 30  # of a container's log
PROBE = {"initial_delay": 10, "period": 10, "timeout": 2}


@dataclass(frozen=True)
class Wanted:
    """A deployment as it should be."""

    name: str
    endpoint: str
    model: Model
    context: Path  # the image's build context
    content: str  # the hash of all that
    instance_type: str
    instances: int
    slots: int
    queue: int
    max_tokens: int


def find(client: MLClient, name: str) -> OnlineEndpoint | None:
    """Return an endpoint of ours, None where there is none. Raises `UserError` for somebody else's."""
    from azure.core.exceptions import ResourceNotFoundError

    with azure.translate_errors():
        try:
            endpoint = client.online_endpoints.get(name)
        except ResourceNotFoundError:
            return None
    if MADE_BY not in (endpoint.tags or {}):
        raise UserError(
            f"endpoint {name} was not made by lab deploy, and stays as it is: choose another with --endpoint"
        )
    return endpoint


def need(client: MLClient, name: str) -> OnlineEndpoint:
    """Return an endpoint of `lab deploy`; raises `UserError` where there is none."""
    if endpoint := find(client, name):
        return endpoint
    raise UserError(
        f"there is no endpoint {name} in workspace {client.workspace_name}: lab deploy NAME"
    )


def deployments(client: MLClient, endpoint: str) -> dict[str, OnlineDeployment]:
    """Return an endpoint's deployments by name."""
    with azure.translate_errors():
        return {each.name: each for each in client.online_deployments.list(endpoint)}


def answering(endpoint: OnlineEndpoint) -> str | None:
    """Return the deployment that has the traffic, None where none has."""
    return max(
        (n for n, share in endpoint.traffic.items() if share),
        key=endpoint.traffic.get,
        default=None,
    )


def answers(client: MLClient, endpoint: OnlineEndpoint, wanted: Wanted) -> bool:
    """Say whether the wanted deployment is there, and has all the traffic."""
    found = deployments(client, endpoint.name).get(wanted.name)
    whole = endpoint.traffic.get(wanted.name) == 100 and state(endpoint) == "succeeded"
    return whole and found is not None and state(found) == "succeeded" and is_same(found, wanted)


def is_same(found: OnlineDeployment, wanted: Wanted) -> bool:
    """Say whether a deployment is of the wanted content."""
    return (found.tags or {}).get(CONTENT) == wanted.content


def state(resource: Any) -> str:
    """Return an endpoint's or a deployment's state in one lower-case word."""
    now = resource.provisioning_state  # text, or an enumeration
    return str(getattr(now, "value", now) or "").lower()


def roll_out(client: MLClient, wanted: Wanted) -> OnlineEndpoint:
    """Bring the wanted deployment up and the traffic to it; return the endpoint.

    Raises `UserError` with nothing changed for those who ask: a deployment that fails is deleted again.
    """
    create_endpoint(client, wanted.endpoint)
    create_deployment(client, wanted)
    check_answer(client, wanted)
    endpoint = need(client, wanted.endpoint)
    if (before := answering(endpoint)) != wanted.name:
        move_traffic(client, endpoint, wanted.name, before)
    delete_others(client, endpoint)
    return endpoint


def create_endpoint(client: MLClient, name: str) -> None:
    """Make the endpoint, unless it is there; wait until it is ready."""
    from azure.ai.ml.entities import ManagedOnlineEndpoint

    endpoint = find(client, name)
    if endpoint is None:
        print(f"Creating endpoint {name}", flush=True)
        # Entra tokens: there is no key that somebody could lose
        new = ManagedOnlineEndpoint(name=name, auth_mode="aad_token", tags={MADE_BY: "1"})
        try:
            finish(lambda: client.online_endpoints.begin_create_or_update(new))
        except UserError as error:
            raise UserError(
                f"endpoint {name} was not made: {error} (--endpoint: another)"
            ) from None
    elif settled(lambda: need(client, name)) != "succeeded":
        raise UserError(f"endpoint {name} is {state(need(client, name))}: --delete it, then again")


def create_deployment(client: MLClient, wanted: Wanted) -> None:
    """Make the deployment without traffic, unless it is there; wait until it is ready.

    Raises `UserError` after the container's last lines where it does not come up, and deletes it.
    """
    found = deployments(client, wanted.endpoint).get(wanted.name)
    if found is not None and state(found) in MOVING:
        print(f"Deployment {wanted.name} is {state(found)} already: waiting for it", flush=True)
        settled(lambda: client.online_deployments.get(wanted.name, wanted.endpoint))
        found = deployments(client, wanted.endpoint).get(wanted.name)
    if found is not None and (state(found) != "succeeded" or not is_same(found, wanted)):
        delete_deployment(client, wanted.endpoint, wanted.name, "it failed before")
        found = None
    if found is None:
        print(f"Creating deployment {wanted.name}, without traffic: this takes minutes", flush=True)
        try:
            with azure.translate_errors():
                new = describe(wanted)
            finish(lambda: client.online_deployments.begin_create_or_update(new))
        except UserError as error:
            give_up(client, wanted, f"did not come up: {error}")


def describe(wanted: Wanted) -> OnlineDeployment:
    """Return the deployment as Azure ML's own library describes it."""
    from azure.ai.ml.entities import (
        BuildContext,
        Environment,
        ManagedOnlineDeployment,
        OnlineRequestSettings,
        ProbeSettings,
    )

    routes = {
        "liveness_route": {"port": PORT, "path": "/livez"},
        "readiness_route": {"port": PORT, "path": "/readyz"},
        "scoring_route": {"port": PORT, "path": "/v1/chat/completions"},
    }
    return ManagedOnlineDeployment(
        name=wanted.name,
        endpoint_name=wanted.endpoint,
        model=f"azureml:{wanted.model.name}:{wanted.model.version}",
        model_mount_path=MOUNT,
        environment=Environment(
            build=BuildContext(path=str(wanted.context)), inference_config=routes
        ),
        environment_variables={
            "LAB_MODEL": MOUNT,
            "LAB_ADAPTER": str(wanted.model.name),
            "LAB_PORT": str(PORT),
            "LAB_SLOTS": str(wanted.slots),
            "LAB_QUEUE": str(wanted.queue),
            "LAB_MAX_TOKENS": str(wanted.max_tokens),
            "LAB_BEHIND_GATEWAY": "1",  # the endpoint checks tokens
        },
        instance_type=wanted.instance_type,
        instance_count=wanted.instances,
        request_settings=OnlineRequestSettings(
            request_timeout_ms=LONGEST_ANSWER,
            # the default is 1, and 429 for whoever asks second: our own queue says it later
            max_concurrent_requests_per_instance=wanted.slots + wanted.queue,
        ),
        liveness_probe=ProbeSettings(failure_threshold=30, **PROBE),
        readiness_probe=ProbeSettings(failure_threshold=30, **PROBE),
        tags={CONTENT: wanted.content, "version": str(wanted.model.version)},
    )


def check_answer(client: MLClient, wanted: Wanted) -> None:
    """Ask the new deployment a question, past the traffic. Raises `UserError` where no answer comes."""
    try:
        print(
            f"Asked {QUESTION!r}, it says {ask(client, wanted.endpoint, wanted.name, wanted.model.name)!r}"
        )
    except Refused as error:
        raise UserError(
            f"{error}; {wanted.name} stays without traffic: the same command goes on"
        ) from None
    except UserError as error:
        give_up(client, wanted, f"did not answer: {error}")


class Refused(UserError):
    """The question did not reach the container: what is wrong lies on the way."""


def ask(client: MLClient, endpoint: str, deployment: str, model: str) -> str:
    """Return a deployment's answer to a question. Raises `Refused` or `UserError` where there is none."""
    from azure.core.exceptions import AzureError, HttpResponseError

    body = {"model": model, "max_tokens": 16, "messages": [{"role": "user", "content": QUESTION}]}
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder, "question.json")
        request.write_text(json.dumps(body), encoding="utf-8")
        with azure.translate_errors():
            try:
                said = client.online_endpoints.invoke(
                    endpoint, request_file=str(request), deployment_name=deployment
                )
            except AzureError as error:
                # whoever has a status and not these was let in
                answered = isinstance(error, HttpResponseError)
                if answered and error.status_code not in (401, 403):
                    raise UserError(azure.explain(error)) from None
                raise Refused(azure.explain(error)) from None
    try:
        text = json.loads(said)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{said[:200]!r} is no chat completion") from None
    if not text.strip():
        raise UserError("the answer is empty")
    return " ".join(text.split())


def give_up(client: MLClient, wanted: Wanted, why: str) -> None:
    """Print the container's last lines, delete its deployment, and raise `UserError`."""
    if lines := last_lines(client, wanted):
        print(f"The last lines of {wanted.name}'s container:\n{lines}", file=sys.stderr)
    else:
        print(f"{wanted.name}'s container has said nothing", file=sys.stderr)
    if wanted.name in deployments(client, wanted.endpoint):
        delete_deployment(client, wanted.endpoint, wanted.name, "it would be billed")
    now = answering(need(client, wanted.endpoint))
    stays = (
        f"{now} goes on answering"
        if now
        else f"endpoint {wanted.endpoint} is empty and costs nothing"
    )
    raise UserError(f"deployment {wanted.name} {why}; {stays}")


def last_lines(client: MLClient, wanted: Wanted) -> str:
    """Return what a container said last: the server's, or else that of what brings the model."""
    # a container that never was has no log, and Azure an error for it
    for container in ("inference-server", "storage-initializer"):
        with (
            contextlib.suppress(UserError),
            azure.translate_errors(),
        ):
            said = client.online_deployments.get_logs(
                wanted.name, wanted.endpoint, LINES, container_type=container
            ).strip()
            if said:
                return "\n".join(f"  {line}" for line in said.splitlines()[-LINES:])
    return ""


def move_traffic(client: MLClient, endpoint: OnlineEndpoint, to: str, before: str | None) -> None:
    """Give a deployment all traffic, and note which one had it."""
    endpoint.traffic = {to: 100}
    endpoint.tags = {k: v for k, v in (endpoint.tags or {}).items() if k != PREVIOUS}
    if before:
        endpoint.tags[PREVIOUS] = before
    finish(lambda: client.online_endpoints.begin_create_or_update(endpoint))
    kept = f"; {before} is kept for --rollback, and billed" if before else ""
    print(f"All traffic goes to {to}{kept}", flush=True)


def delete_others(client: MLClient, endpoint: OnlineEndpoint) -> None:
    """Delete those of our deployments that neither answer nor are kept for a rollback."""
    kept = {answering(endpoint), (endpoint.tags or {}).get(PREVIOUS)}
    for name, each in deployments(client, endpoint.name).items():
        if name not in kept and CONTENT in (each.tags or {}) and state(each) != "deleting":
            delete_deployment(client, endpoint.name, name, "two newer ones are there")


def delete_deployment(client: MLClient, endpoint: str, name: str, why: str) -> None:
    """Delete a deployment and say so."""
    print(f"Deleting deployment {name}: {why}", flush=True)
    finish(lambda: client.online_deployments.begin_delete(name, endpoint))


def roll_back(client: MLClient, name: str) -> None:
    """Give the traffic back to the deployment that had it before, once it has answered a question."""
    endpoint = need(client, name)
    now, before = answering(endpoint), (endpoint.tags or {}).get(PREVIOUS)
    found = deployments(client, name).get(before or "")
    if found is None:
        raise UserError(
            f"endpoint {name} has no deployment before {now or 'it'}: nothing to go back to"
        )
    served = (found.environment_variables or {}).get("LAB_ADAPTER", "")
    print(f"Asked {QUESTION!r}, {before} says {ask(client, name, str(before), served)!r}")
    move_traffic(client, endpoint, str(before), now)


def delete(client: MLClient, name: str) -> None:
    """Delete an endpoint with its deployments."""
    need(client, name)
    print(f"Deleting endpoint {name}", flush=True)
    finish(lambda: client.online_endpoints.begin_delete(name))
    print("Deleted: nothing of it is billed any more. Model and image stay in the workspace")


def finish(begin: Callable[[], Any]) -> Any:
    """Start an operation of Azure's and wait for its end; return what comes of it."""
    try:
        # the SDK prints a dot at every look
        with azure.translate_errors(), contextlib.redirect_stdout(io.StringIO()):
            return begin().result()
    except KeyboardInterrupt:
        raise UserError(
            "no longer waiting, but Azure goes on, and bills what it makes: the same command waits again, "
            "lab deploy NAME --delete ends it"
        ) from None


def settled(look: Callable[[], Any]) -> str:
    """Wait until a resource's state is none that passes; return it."""
    with azure.translate_errors():
        while (now := state(look())) in MOVING:
            time.sleep(POLL)
    return now


def lines_of(client: MLClient, endpoint: OnlineEndpoint) -> Iterator[str]:
    """Yield what there is of an endpoint, a line each."""
    yield f"{endpoint.name}  {state(endpoint)}"
    yield f"  {endpoint.scoring_uri}"
    found = deployments(client, endpoint.name)
    for name, each in sorted(found.items()):
        share = endpoint.traffic.get(name, 0)
        kept = "  kept for --rollback" if name == (endpoint.tags or {}).get(PREVIOUS) else ""
        yield (
            f"  {name}  {share:>3} %  {state(each)}  version {(each.tags or {}).get('version', '?')}  "
            f"{each.instance_count} x {each.instance_type}{kept}"
        )
    if found:
        yield "  Billed by the hour, asked or not, until lab deploy NAME --delete"
    else:
        yield "  No deployment: nothing is billed"
