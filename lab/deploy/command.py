"""Put a registered model behind OpenAI's API: a container's folder, a server here, or an Azure ML endpoint.

lab deploy --folder server                     # a build context that knows nothing of Azure
lab deploy --local                             # that folder's server on this machine, with models/
lab deploy ft-for-travel                       # a managed online endpoint with the newest version
lab deploy ft-for-travel --status              # what there is; --rollback and --delete likewise

The same line again changes nothing, and goes on where an earlier one was interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lab.deploy import folder as context
from lab.serve.command import MaxTokens, Queue
from stages.core.errors import UserError

if TYPE_CHECKING:
    from azure.ai.ml import MLClient

    from lab.deploy.endpoint import Wanted

MACHINE = "Standard_DS3_v2"


def deploy(
    model: Annotated[
        str | None, typer.Argument(metavar="[NAME[:VERSION]]", help="Default: the newest version.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Only write the container's folder.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Run the container here.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Show the endpoint.")] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Traffic to the one before.")
    ] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the endpoint.")] = False,
    endpoint: Annotated[
        str | None, typer.Option(help="The endpoint's name [default: from NAME].")
    ] = None,
    instance_type: Annotated[str, typer.Option(help="The endpoint's machine.")] = MACHINE,
    instances: Annotated[int, typer.Option(min=1, max=50, help="How many of them.")] = 1,
    slots: Annotated[int, typer.Option(min=1, help="Answers made at once by one.")] = 8,
    queue: Queue = 16,
    max_tokens: MaxTokens = 256,
    files: Annotated[
        Path, typer.Option("--model", help="With --local: the folder with onnx/.")
    ] = Path("models"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="With --local.")] = 8000,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Despite the version's gates.")] = False,
) -> None:
    """Put a model behind OpenAI's API. In a container here, or on an Azure ML endpoint."""
    asked = {"--status": status, "--rollback": rollback, "--delete": delete, "--local": local}
    chosen = [name for name, wanted in asked.items() if wanted]
    if len(chosen) > 1 or (folder and chosen not in ([], ["--local"])):
        raise UserError(
            f"{' and '.join(chosen)}{' and --folder' if folder else ''}: give one of them"
        )
    if local or folder:
        if model:
            raise UserError(
                f"{model}: --folder and --local need no registered model: lab download {model} brings it, "
                "and --local takes its folder by --model"
            )
        here(folder, files if local else None, port)
        return
    if model is None and not (endpoint and chosen):
        raise UserError("which model? lab deploy NAME[:VERSION], or --folder, or --local")
    need_azure()
    from lab.azureml import workspace
    from lab.deploy import endpoint as endpoints
    from lab.deploy.preflight import check_name

    if endpoint:
        check_name(endpoint)
    client = workspace.need().connect()
    name = endpoint or endpoint_name(client, (model or "").partition(":")[0])
    check_name(name)
    if status:
        print("\n".join(endpoints.lines_of(client, endpoints.need(client, name))))
    elif rollback:
        endpoints.roll_back(client, name)
    elif delete:
        endpoints.need(client, name)
        confirm(name, yes)
        endpoints.delete(client, name)
    else:
        options = (instance_type, instances, slots, queue, max_tokens)
        online(client, str(model), name, options, force)


def need_azure() -> None:
    """Raise `UserError` where the extra is not installed."""
    with contextlib.suppress(ModuleNotFoundError):  # of `azure` itself
        if find_spec("azure.ai.ml") and find_spec("azure.identity"):
            return
    raise UserError(
        "lab deploy NAME needs azure-ai-ml: `make setup` installs it, or `pip install -e '.[cpu,azure]'`; "
        "--folder and --local do without"
    )


def here(folder: Path | None, files: Path | None, port: int) -> None:
    """Write the folder; with files of a model, run its server too."""
    from lab.deploy import local

    if folder is not None:
        print(f"{folder} is written" if context.write(folder) else f"{folder} is as it should be")
        if files is None:
            readme = folder / "README.md"
            print(f"{readme} says how to build and run it")
            print(f"Here: lab deploy --folder {folder} --local")
            return
    with tempfile.TemporaryDirectory() as beside:
        if folder is None:
            folder = Path(beside, "server")
            context.write(folder)
        if files is not None and (code := local.run(folder, files, port)):
            raise typer.Exit(code)


def endpoint_name(client: MLClient, model: str) -> str:
    """Return the endpoint's name of a model: another in each workspace, for a region has a name once."""
    place = "/".join((client.subscription_id, client.resource_group_name, client.workspace_name))
    words = re.sub(r"[^A-Za-z0-9]+", "-", model)[:25].strip("-")
    return f"{words}-{hashlib.sha256(place.lower().encode()).hexdigest()[:6]}"


def online(
    client: MLClient, model: str, name: str, options: tuple[str, int, int, int, int], force: bool
) -> None:
    """Bring a version to its endpoint. Raises `UserError` before anything is made where that can be known."""
    from lab.deploy import endpoint as endpoints
    from lab.deploy import preflight
    from lab.registry import download

    found = download.find(client, model)
    preflight.check_version(client, found, force)
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside, "server")
        context.write(folder)
        content = digest(found, options)
        number = re.sub(r"[^A-Za-z0-9]+", "-", str(found.version))[:20].strip("-")
        wanted = endpoints.Wanted(
            f"v{number}-{content[:8]}", name, found, folder, content, *options
        )
        endpoint = endpoints.find(client, name)
        if endpoint and endpoints.answers(client, endpoint, wanted):
            endpoints.delete_others(client, endpoint)  # where an earlier command was killed before
            print(f"{name} answers with this very content ({wanted.name}): nothing to do")
            return
        check(client, wanted, there=endpoint is not None)
        endpoint = endpoints.roll_out(client, wanted)
    print(f"{found.name} version {found.version} answers at {endpoint.scoring_uri}")
    print(
        f"lab deploy {found.name} --status shows it, --rollback goes back, --delete ends what it costs"
    )


def check(client: MLClient, wanted: Wanted, there: bool) -> None:
    """Say what it costs; raise `UserError` for a role or a quota that is missing."""
    from lab.deploy import endpoint as endpoints
    from lab.deploy import preflight
    from stages.core import azure

    with azure.translate_errors():
        place = client.workspaces.get(client.workspace_name)
    preflight.check_role(client, place.id)
    machines = preflight.machines(client, place.location, wanted.instance_type, wanted.instances)
    others = endpoints.deployments(client, wanted.endpoint) if there else {}
    if wanted.name not in others:  # one that is there has its cores
        preflight.check_quota(client, place.location, machines)
    print(f"Billed while it exists, asked or not: {machines.cost}")
    if set(others) - {wanted.name}:
        print("  beside what the deployment before costs, which is kept for --rollback")
    sys.stdout.flush()


def digest(model: object, options: tuple[str, int, int, int, int]) -> str:
    """Return a hash of all that makes a deployment what it is."""
    tags = getattr(model, "tags", None) or {}
    which = [model.name, str(model.version), tags.get("content_sha256")]  # type: ignore[attr-defined]
    whole = json.dumps([which, context.digest(context.contents()), options])
    return hashlib.sha256(whole.encode()).hexdigest()


def confirm(name: str, yes: bool) -> None:
    """Ask before an endpoint is deleted. Raises `UserError` for no, and where there is nobody to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"endpoint {name} is not deleted: nobody is here to ask; --yes deletes it")
    if not typer.confirm(f"Delete endpoint {name}, and all its deployments?"):
        raise UserError(f"endpoint {name} is not deleted")
