"""The jobs of `lab submit`: their state, parameters and metrics.

lab jobs
lab jobs --restore NAME       # results of a job that was not waited for, into the workspace
lab cancel NAME
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from lab.azureml import results, submit, workspace
from lab.azureml.datastore import Datastore
from stages.core import azure
from stages.core.errors import UserError
from stages.core.settings import load

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.ai.ml.entities import Job

SHOWN = 20


def jobs(
    restore: Annotated[
        str | None, typer.Option(metavar="NAME", help="Bring this job's results here.")
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="How many to list.")] = SHOWN,
) -> None:
    """List the jobs of lab submit. Shows their state, parameters and metrics."""
    client = workspace.need().connect()
    if restore:
        restore_job(client, restore)
        return
    with azure.translate_errors():
        ours = (job for job in client.jobs.list() if job.experiment_name == submit.EXPERIMENT)
        listed = list(islice(ours, last))  # newest first: the rest of a long list is not asked for
    store = Datastore(client)
    for job in listed:
        print(line(store, job))
    if not listed:
        print("No jobs yet: lab submit")


def line(store: Datastore, job: Job) -> str:
    """Say a job's name, state, parameters and the metrics that have gates."""
    state, tags = submit.word(job.status), job.tags or {}
    what = tags.get("overrides") or tags.get("stages") or "-"
    shown = []
    if state == "Completed":
        found = results.metrics(store, job.name)
        names = [name for name in load().evaluate.gates if name in found] or list(found)[:3]
        shown = [f"{name}={found[name]:g}" for name in names]
    return f"{job.name:24} {state:10} {what:32} {' '.join(shown)}".rstrip()


def cancel(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As lab jobs lists it.")],
) -> None:
    """Cancel a job. What its finished stages pushed stays in the remote."""
    client = workspace.need().connect()
    state = submit.word(find(client, name).status)
    if state in submit.ENDED:
        raise UserError(f"job {name} is {state} already: nothing to cancel")
    with azure.translate_errors():
        client.jobs.begin_cancel(name)
    print(f"{name} is being canceled: lab jobs shows when it has ended")


def find(client: MLClient, name: str) -> Job:
    """Return a job by its name. Raises `UserError` where there is none."""
    from azure.core.exceptions import ResourceNotFoundError

    with azure.translate_errors():
        try:
            return client.jobs.get(name)
        except ResourceNotFoundError:
            raise UserError(f"no job {name}: lab jobs lists them") from None


def restore_job(client: MLClient, name: str) -> None:
    """Save a finished job's results as an experiment and bring them into the workspace."""
    job = find(client, name)
    state, baseline = submit.word(job.status), (job.tags or {}).get("baseline")
    if baseline is None:
        raise UserError(f"job {name} is not one of lab submit: lab jobs lists those that are")
    if state != "Completed":
        raise UserError(f"job {name} is {state}: only a completed job has results")
    task = submit.Task(name, [], [], baseline)
    submit.bring_back(Datastore(client), task, into_workspace=True)
