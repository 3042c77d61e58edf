"""A job's curves in Azure ML studio's Metrics tab, by MLflow's REST interface: written, and read again.

    with sent():                         # on the node: what the stages tell, as metrics of the job
        run.run(...)
    Studio.of_workspace(client).history(job, "loss")

azureml-mlflow needs other versions of libraries than DVC's remote does, and three requests are all there is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core import azure, live
from stages.core.live import Event

if TYPE_CHECKING:
    from azure.ai.ml import MLClient

PAUSE = 5.0  # seconds between two requests of a node
MOST = 200  # metrics of one request
NAMES = ("loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second")
API = "api/2.0/mlflow/"
Metric = dict[str, Any]  # key, value, step, and timestamp in milliseconds


class Studio:
    """MLflow's interface of a workspace."""

    def __init__(self, uri: str, tokens: list[Callable[[], str]]) -> None:
        """Take a tracking URI, and what gives tokens: the next where one is refused."""
        self.address = "https://" + uri.partition("://")[2].partition("?")[0].rstrip("/")
        self.tokens = tokens

    @classmethod
    def of_node(cls) -> Studio | None:
        """Return the workspace of the job that this process belongs to; None where it belongs to none."""
        uri, token = os.environ.get("MLFLOW_TRACKING_URI", ""), "MLFLOW_TRACKING_TOKEN"
        if not uri.startswith("azureml://") or "MLFLOW_RUN_ID" not in os.environ:
            return None
        # the job's own token may expire before a long training ends
        given = [lambda: os.environ[token]] if token in os.environ else []
        return cls(uri, [*given, own_token])

    @classmethod
    def of_workspace(cls, client: MLClient) -> Studio:
        """Return the client's workspace."""
        with azure.translate_errors():
            uri = client.workspaces.get(client.workspace_name).mlflow_tracking_uri
        return cls(uri, [own_token])

    def log(self, job: str, metrics: list[Metric]) -> None:
        """Add metrics to a job's."""
        for start in range(0, len(metrics), MOST):
            self.ask("runs/log-batch", {"run_id": job, "metrics": metrics[start : start + MOST]})

    def last(self, job: str) -> list[Metric]:
        """Return the last value of each metric of a job."""
        return self.ask(f"runs/get?{query(run_id=job)}")["run"]["data"].get("metrics", [])

    def history(self, job: str, key: str) -> list[Metric]:
        """Return all values of a metric."""
        asked = query(run_id=job, metric_key=key)
        return self.ask(f"metrics/get-history?{asked}").get("metrics", [])

    def ask(self, path: str, body: Any = None) -> Any:
        """Send a request; return its answer. Raises `OSError` where there is none."""
        data = None if body is None else json.dumps(body).encode()
        while True:
            headers = {
                "Authorization": f"Bearer {self.tokens[0]()}",
                "Content-Type": "application/json",
            }
            request = urllib.request.Request(f"{self.address}/{API}{path}", data, headers)  # noqa: S310
            try:
                with urllib.request.urlopen(request, timeout=azure.PATIENCE) as answer:  # noqa: S310
                    return json.loads(answer.read() or "{}")
            except urllib.error.HTTPError as error:
                if error.code not in (401, 403) or len(self.tokens) == 1:
                    raise
                self.tokens.pop(0)


def own_token() -> str:
    """Return a token of who is signed in here, or of the node's identity."""
    return azure.credential().get_token(f"{azure.ARM}/.default").token


def query(**words: str) -> str:
    """Return the query of a URL."""
    return urllib.parse.urlencode(words)


@contextlib.contextmanager
def sent() -> Iterator[None]:
    """Send what the stages tell to the job's metrics while the block runs. Trouble is one line."""
    studio = Studio.of_node()
    if studio is None:
        yield
        return
    sender, over = Sender(studio, os.environ["MLFLOW_RUN_ID"]), threading.Event()

    def work() -> None:
        while not over.wait(PAUSE):
            sender.send()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        sender.send()


class Sender:
    """Sends what is new in the stages' files; what could not be sent is tried again with the next."""

    def __init__(self, studio: Studio, job: str) -> None:
        self.studio, self.job = studio, job
        self.seen: dict[Path, int] = {}
        self.waiting: list[Metric] = []
        self.complained = False

    def send(self) -> None:
        """Send once."""
        for file in sorted(live.FOLDER.glob("*/*.jsonl")):
            events = live.events(file)
            for event in events[self.seen.get(file, 0) :]:
                self.waiting += metrics_of(file.stem, event)
            self.seen[file] = len(events)
        try:
            self.studio.log(self.job, self.waiting)
            self.waiting = []
        except Exception as error:  # noqa: BLE001  # whatever it is, the job matters more
            if not self.complained:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"job: the studio's Metrics tab lacks the curves: {reason}", flush=True)
            self.complained = True


def metrics_of(stage: str, event: Event) -> list[Metric]:
    """Return what a stage told as metrics: training's by their names, how far a loop is in percent."""
    if "done" not in event or event.get("earlier"):
        return []
    values = {name: event[name] for name in NAMES if name in event}
    if event.get("of"):
        # MLflow takes letters, digits and - _ . / in a name
        loop = re.sub(r"[^\w./ -]", "", event.get("what", ""))
        values[f"{stage}.{loop}"] = 100 * event["done"] / event["of"]
    at = {"timestamp": int(event["time"] * 1000), "step": event["done"]}
    return [{"key": key, "value": value, **at} for key, value in values.items()]


def events_of(metrics: list[Metric]) -> dict[str, list[Event]]:
    """Return what `metrics_of` was made from, by stage, the oldest first."""
    told: dict[tuple[str, str, int], Event] = {}
    for metric in sorted(metrics, key=lambda metric: metric["timestamp"]):
        stage, dot, what = metric["key"].partition(".")
        if not dot:
            stage, what = "finetune", "training"
        step = int(metric["step"])
        event = told.setdefault((stage, what, step), {"done": step, "what": what})
        event["time"] = metric["timestamp"] / 1000
        if dot:
            event["of"] = round(100 * step / metric["value"])
        else:
            event[metric["key"]] = metric["value"]
    found: dict[str, list[Event]] = {}
    for (stage, _, _), event in told.items():
        found.setdefault(stage, []).append(event)
    return found
