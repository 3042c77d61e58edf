"""The node of a deployment: the context that was sent, the model where it is mounted, the image's variables.

A process stands for the container. This Python stands for the packages that the image installs.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from support.processes import wait_until

from .service import Answer

if TYPE_CHECKING:
    from .cloud import Cloud


class Nodes:
    """Runs containers; ends them with the test."""

    def __init__(self, cloud: Cloud, folder: Path) -> None:
        self.cloud = cloud
        self.folder = folder
        self.processes: list[subprocess.Popen] = []

    def start(self, resource: dict) -> None:
        """Bring a container up, probe it as Azure does, and let it answer for its deployment."""
        asked, home = resource["properties"], self.folder / resource["name"]
        environment = self.asset(asked["environmentId"])
        self.cloud.download(environment["build"]["contextUri"], home / "context")
        mount = home / asked["modelMountPath"].strip("/")
        self.mount(asked["model"], mount)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        variables = self.variables(home / "context/Dockerfile") | asked["environmentVariables"]
        assert {route["port"] for route in environment["inferenceConfig"].values()} == {
            int(variables["LAB_PORT"])
        }
        variables |= {"LAB_MODEL": str(mount), "LAB_PORT": str(port), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "lab.deploy.server"],
            cwd=home / "context/app",
            env={"PATH": "/nowhere", "HOME": "/nonexistent", **variables},
            stderr=(home / "log").open("w"),
            stdout=subprocess.DEVNULL,
        )
        self.processes.append(process)
        for route in ("livenessRoute", "readinessRoute"):
            path = environment["inferenceConfig"][route]["path"]

            def well(path: str = path) -> bool:
                assert process.poll() is None, (home / "log").read_text()
                return get(f"http://127.0.0.1:{port}{path}") == 200

            wait_until(well)
        path = environment["inferenceConfig"]["scoringRoute"]["path"]
        container = self.cloud.service.endpoints.containers[resource["name"]]
        container.answer = lambda body: post(f"http://127.0.0.1:{port}{path}", body)

    def asset(self, identity: str) -> dict:
        """Return an environment's or a model's properties."""
        _, _, path = identity.partition("/workspaces/")
        return self.cloud.service.resource_of(path.partition("/")[2])["properties"]

    def mount(self, model: str, folder: Path) -> None:
        """Put a version where Azure ML does: below its name and number, in its own folder."""
        _, name, _, number = model.rsplit("/", 3)
        prefix = self.asset(model)["modelUri"].partition("/paths/")[2]
        for blob in self.cloud.datastore.list_blob_names(name_starts_with=f"{prefix}/"):
            file = folder / name / number / Path(prefix).name / blob.removeprefix(f"{prefix}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.cloud.datastore.download_blob(blob).readall())

    def variables(self, dockerfile: Path) -> dict[str, str]:
        """Return what the image sets."""
        lines = re.findall(r"^ENV (.*)$", dockerfile.read_text(encoding="utf-8"), re.MULTILINE)
        return dict(word.split("=", 1) for line in lines for word in line.split())

    def end(self) -> None:
        """End all containers."""
        for process in self.processes:
            process.kill()
            process.wait()


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str) -> int:
    """Return the status of a GET, 0 where nobody listens."""
    try:
        return OPENER.open(url).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def post(url: str, body: dict) -> Answer:
    """Return what a server says to JSON, under a name that is not loopback's, as behind an endpoint."""
    headers = {"Content-Type": "application/json", "Host": "some.inference.ml.azure.com"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with OPENER.open(request) as answer:
            return 200, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
