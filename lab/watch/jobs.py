"""An Azure ML job as a run: its state, and what its stages sent to the studio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.azureml import jobs, submit
from lab.azureml.curves import Metric, Studio, events_of
from lab.watch.runs import Run, Stage
from stages.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from azure.ai.ml import MLClient


def look_at_job(client: MLClient, name: str) -> Callable[[], Run]:
    """Return how to look at a job again and again. Raises `UserError` where there is none."""
    jobs.find(client, name)
    studio = Studio.of_workspace(client)
    last: dict[str, Metric] = {}
    histories: dict[str, list[Metric]] = {}

    def look() -> Run:
        state = submit.state_of(client, name)
        try:
            for metric in studio.last(name):
                if last.get(metric["key"]) != metric:  # else nothing is new
                    histories[metric["key"]] = studio.history(name, metric["key"])
                    last[metric["key"]] = metric
        except OSError as error:
            raise UserError(
                f"Azure ML does not show the metrics of {name} ({error}); the job is {state}: lab jobs"
            ) from None
        told = events_of([metric for history in histories.values() for metric in history])
        stages = [Stage(stage, events) for stage, events in told.items()]
        stages.sort(key=lambda stage: stage.events[0]["time"])
        alive = state not in submit.ENDED
        return Run(name, stages, alive, f"{state}{'' if alive else ended(name, state)}")

    return look


def ended(name: str, state: str) -> str:
    """Say what to do with a job that has ended."""
    if state == "Completed":
        return f", lab jobs --restore {name} brings its results"
    return ", its log in the studio says why"
