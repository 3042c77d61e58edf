"""Run the changed stages as a job on an Azure ML cluster; the laptop gets the results back.

lab submit                                       # what changed here
lab submit -S finetune.max_steps=200             # as `dvc exp run -S`
lab submit --sweep finetune.rank=8,16,32         # a job each, in parallel; what they share is computed once
lab submit --gpus 2                              # on two GPUs of a node; without it on all that the node has
lab submit --detach                              # do not wait; lab jobs --restore NAME fetches the results

A job gets the files that git tracks, as they are, and everything else from the DVC remote.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lab import run
from lab.azureml import gpus as gpus_of_a_node
from lab.azureml import results, snapshot, sweep, workspace
from lab.azureml.datastore import Datastore
from lab.remote import config
from lab.remote.reach import is_emulator
from stages.core import azure
from stages.core.errors import UserError

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.ai.ml.entities import Job

EXPERIMENT = "olive-lab"  # the jobs' name in Azure ML studio
CLUSTER = "gpu-cluster"
ENDED = ("Completed", "Failed", "Canceled")


class JobFailed(UserError):
    """A job ended without results."""


@dataclass(frozen=True)
class Task:
    """What one job does, and on top of which commit."""

    name: str
    overrides: list[str]
    stages: list[str]
    baseline: str

    @property
    def command(self) -> str:
        """The job's command line."""
        settings = [word for override in self.overrides for word in ("-S", override)]
        words = shlex.join(["python", "-m", "lab.azureml.job", *settings, *self.stages])
        return f"{words} --result ${{{{outputs.result}}}}"


def submit(
    overrides: Annotated[
        list[str] | None,
        typer.Option("-S", "--set-param", metavar="KEY=VALUE", help="As in `dvc exp run`."),
    ] = None,
    sweeps: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="KEY=A,B,C", help="A job for each value, repeatable."),
    ] = None,
    compute: Annotated[str, typer.Option(envvar="AZUREML_COMPUTE", help="The cluster.")] = CLUSTER,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of the node to use [default: all].")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="1: no stage spans several.")] = 1,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the results.")] = False,
) -> None:
    """Run what changed on an Azure ML cluster. Then brings dvc.lock and metrics back."""
    overrides, sweeps = overrides or [], sweeps or []
    gpus_of_a_node.check_nodes(nodes)
    sweep.check(overrides)
    combined = (
        [[*overrides, *more] for more in sweep.combinations(sweeps)] if sweeps else [overrides]
    )
    for each in combined:
        snapshot.bring_params_up_to_date(each)
        snapshot.check_ignored(each)
    client = preflight(compute)
    if gpus:
        gpus_of_a_node.check(client, compute, gpus)
    variables = gpus_of_a_node.variables(gpus)
    run.dvc("push", "--run-cache")
    if len(combined) > 1 and (stages := sweep.common_work(combined)):
        print(f"First, once for all: {', '.join(stages)}", flush=True)
        (common,) = start(client, compute, variables, [overrides], stages)
        watch(client, common.name)
    tasks = start(client, compute, variables, combined)
    if detach:
        print(f"lab jobs shows them; lab jobs --restore {tasks[0].name} fetches results")
        return
    finish(client, tasks)


def preflight(compute: str) -> MLClient:
    """Raise `UserError` for what a paid node would otherwise find out; return the workspace's client."""
    place = workspace.need()
    found = config.load()
    if is_emulator(found.login.get("connection_string") or ""):
        raise UserError(
            "the remote is an emulator on this machine, which a job cannot reach: lab remote setup"
        )
    found.check()
    client = place.connect()
    check_compute(client, compute)
    return client


def check_compute(client: MLClient, name: str) -> None:
    """Raise unless the cluster exists, is healthy and has an identity to reach the remote with."""
    from azure.core.exceptions import ResourceNotFoundError

    with azure.translate_errors():
        try:
            compute = client.compute.get(name)
        except ResourceNotFoundError:
            known = ", ".join(each.name for each in client.compute.list()) or "none"
            raise UserError(
                f"no compute {name} in workspace {client.workspace_name} (there: {known}): choose one "
                "with --compute, or create it: az ml compute create (docs/azure.md)"
            ) from None
    if compute.provisioning_errors:
        raise UserError(
            f"compute {name} is not usable, Azure says {compute.provisioning_errors}: quota is asked for in "
            "Azure ML studio (Quota), another cluster chosen with --compute"
        )
    if compute.type == "amlcompute" and not compute.identity:
        raise UserError(
            f"compute {name} has no managed identity to reach the remote with: "
            f"az ml compute update --name {name} --identity-type SystemAssigned (docs/azure.md)"
        )


def start(
    client: MLClient,
    compute: str,
    variables: dict[str, str],
    combined: list[list[str]],
    stages: list[str] | None = None,
) -> list[Task]:
    """Submit a job for each combination; all get the same snapshot and environment."""
    tasks, store = [], Datastore(client)
    with tempfile.TemporaryDirectory() as folder:
        code = snapshot.take(Path(folder))
        context = snapshot.environment(Path(folder))
        for overrides in combined:
            name = f"{run.random_name()}-{secrets.token_hex(2)}"  # unlike any in the workspace
            task = Task(name, overrides, stages or [], snapshot.remember(name))
            result = store.uri(f"{results.FOLDER}/{name}/")
            job = describe(task, compute, variables, code, context, result)
            with azure.translate_errors():
                job = client.jobs.create_or_update(job)
            print(f"Submitted {name} {' '.join(overrides)}\n  {job.studio_url}", flush=True)
            tasks.append(task)
    return tasks


def describe(
    task: Task, compute: str, variables: dict[str, str], code: Path, context: Path, result: str
) -> Job:
    """Return the job as Azure ML's own library describes it."""
    from azure.ai.ml import Output, command
    from azure.ai.ml.entities import BuildContext, Environment, ManagedIdentityConfiguration

    return command(
        name=task.name,
        experiment_name=EXPERIMENT,
        code=str(code),
        command=task.command,
        environment=Environment(build=BuildContext(path=str(context))),
        environment_variables=variables,
        compute=compute,
        identity=ManagedIdentityConfiguration(),
        outputs={"result": Output(type="uri_folder", path=result, mode="upload")},
        tags={
            "baseline": task.baseline,
            "overrides": " ".join(task.overrides),
            "stages": " ".join(task.stages),
        },
    )


def finish(client: MLClient, tasks: list[Task]) -> None:
    """Wait for all jobs and bring back each that completed; then raises for those that failed."""
    store, failures = Datastore(client), []
    for task in tasks:
        try:
            watch(client, task.name)
            bring_back(store, task, into_workspace=len(tasks) == 1)
        except JobFailed as error:
            failures.append(str(error))
    if len(tasks) > 1:
        print("dvc exp show compares them, lab jobs --restore NAME brings one into the workspace")
    if failures:
        raise UserError("; ".join(failures))


def watch(client: MLClient, job: str) -> None:
    """Stream a job's log until it has ended; raises `UserError` unless it completed."""
    from azure.ai.ml.exceptions import JobException

    try:
        with azure.translate_errors(), contextlib.suppress(JobException):  # the state tells
            client.jobs.stream(job)
        state = state_of(client, job)
    except UserError as error:
        raise UserError(
            f"{error}; the job is still running: lab jobs --restore {job} brings its results later"
        ) from None
    except KeyboardInterrupt:
        raise UserError(
            f"no longer waiting, but {job} is still running: lab jobs --restore {job} brings its results, "
            f"lab cancel {job} ends it"
        ) from None
    if state not in ENDED:
        raise UserError(
            f"{job} is still running: lab jobs --restore {job} brings its results later"
        )
    if state != "Completed":
        raise JobFailed(
            f"{job} {state.lower()}: its log (above, and in the studio) says why; "
            "the same command continues from what was pushed"
        )


def state_of(client: MLClient, name: str) -> str:
    """Return a job's state in Azure ML's words."""
    with azure.translate_errors():
        return word(client.jobs.get(name).status)


def word(status: Any) -> str:
    """Return the bare word of a status, which the library has as text or as an enumeration."""
    return str(getattr(status, "value", status))


def bring_back(store: Datastore, task: Task, *, into_workspace: bool) -> None:
    """Save a job's results as an experiment, and bring them into the workspace where that is wanted."""
    files = results.read(store, task.name)
    results.save_experiment(task.name, task.baseline, files)
    if into_workspace:
        results.bring_here(task.name, files)
    print(f"Restored without computing: {task.name}", flush=True)
