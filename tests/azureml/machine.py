"""The cluster: runs a submitted job for real, as a process with its own home, environment and identity.

It sees what a node in Azure would: the snapshot, the job's environment variables, the network behind
the relay and a managed identity. Of the laptop it sees nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from .service import JOB_TOKEN, TRACKING, Server, token

if TYPE_CHECKING:
    from .cloud import Cloud

JOB_SECONDS = 600  # more than any job of the tests needs, on a busy machine too
MSI_SECRET = "the node's own"


class Machines:
    """Runs jobs, each in a thread and a folder of its own."""

    def __init__(self, cloud: Cloud, folder: Path) -> None:
        self.cloud = cloud
        self.folder = folder
        self.threads: list[threading.Thread] = []
        self.processes: dict[str, subprocess.Popen] = {}
        self.canceled: set[str] = set()
        self.free = threading.Event()  # cleared: the cluster is full, jobs wait for `wait`
        self.free.set()
        self.identity = Server(("127.0.0.1", 0), Identity)
        threading.Thread(target=self.identity.serve_forever, daemon=True).start()
        cloud.service.start_job = self.start
        cloud.service.cancel_job = self.cancel

    def start(self, name: str, job: dict) -> None:
        """Begin a job, as the service does once it has accepted it."""
        thread = threading.Thread(target=self.run, args=(name, job["properties"]), daemon=True)
        self.threads.append(thread)
        thread.start()

    def run(self, name: str, job: dict) -> None:
        """Unpack, run, upload what it wrote; the status tells how far it is."""
        home = self.folder / name
        (home / "code").mkdir(parents=True)
        details = self.cloud.service.details[name]
        log = self.cloud.datastore.get_blob_client(f"logs/{name}/user_logs/std_log.txt")
        log.upload_blob(b"", overwrite=True)
        details["logFiles"] = {"user_logs/std_log.txt": self.cloud.readable(log)}
        self.set_status(name, "Running")
        self.cloud.download(self.code_of(job), home / "code")
        self.free.wait()
        process = self.processes[name] = self.begin(job, home)
        while process.poll() is None:
            time.sleep(0.2)
            log.upload_blob((home / "log.txt").read_bytes(), overwrite=True)
        log.upload_blob((home / "log.txt").read_bytes(), overwrite=True)
        self.upload_outputs(job, home)
        ended = "Canceled" if name in self.canceled else "Failed"
        self.set_status(name, ended if process.returncode else "Completed")

    def cancel(self, name: str) -> None:
        """Ask a job's process to end, as the service does before it takes the node away."""
        self.canceled.add(name)
        self.processes[name].terminate()

    def set_status(self, name: str, status: str) -> None:
        """Tell both planes how a job is; the run history says more of a failure."""
        self.cloud.service.resource_of(f"jobs/{name}")["properties"]["status"] = status
        details = self.cloud.service.details[name]
        if status == "Failed":
            details["error"] = {"error": {"code": "UserError", "message": "exit code was not 0"}}
        details["status"] = status

    def code_of(self, job: dict) -> str:
        """Return the URI of the container that holds a job's snapshot."""
        path = job["codeId"].partition("/workspaces/")[2].partition("/")[2]
        return self.cloud.service.resource_of(path)["properties"]["codeUri"]

    def begin(self, job: dict, home: Path) -> subprocess.Popen:
        """Start the job's command."""
        command = re.sub(
            r"\$\{\{outputs\.(\w+)\}\}", lambda m: str(home / "outputs" / m[1]), job["command"]
        )
        for output in job.get("outputs") or {}:
            (home / "outputs" / output).mkdir(parents=True)
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=home / "code",
            env=self.environment(job, home),
            stdin=subprocess.DEVNULL,
            stdout=(home / "log.txt").open("w"),
            stderr=subprocess.STDOUT,
        )

    def environment(self, job: dict, home: Path) -> dict[str, str]:
        """Return what a node sets, and the image: this Python stands for the one built from the lock."""
        identity = f"http://127.0.0.1:{self.identity.server_address[1]}/msi/token"
        managed = (job.get("identity") or {}).get("identityType") == "Managed"
        return {
            "HOME": str(home),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "MLFLOW_TRACKING_URI": TRACKING,
            "MLFLOW_TRACKING_TOKEN": JOB_TOKEN,
            "MLFLOW_RUN_ID": home.name,
            **({"MSI_ENDPOINT": identity, "MSI_SECRET": MSI_SECRET} if managed else {}),
            **({"DEFAULT_IDENTITY_CLIENT_ID": "cluster"} if managed else {}),
            **self.cloud.network,
            **(job.get("environmentVariables") or {}),
        }

    def upload_outputs(self, job: dict, home: Path) -> None:
        """Put what the job wrote where its outputs say."""
        for name, output in (job.get("outputs") or {}).items():
            prefix = output["uri"].partition("/paths/")[2].rstrip("/")
            for file in (home / "outputs" / name).rglob("*"):
                if file.is_file():
                    path = f"{prefix}/{file.relative_to(home / 'outputs' / name).as_posix()}"
                    self.cloud.datastore.upload_blob(path, file.read_bytes(), overwrite=True)

    def wait(self) -> None:
        """Let the jobs go on that wait for a machine; return when none runs."""
        self.free.set()
        for thread in self.threads:
            thread.join(JOB_SECONDS)
            assert not thread.is_alive(), f"a job has run for {JOB_SECONDS} s"
        self.threads.clear()


class Identity(BaseHTTPRequestHandler):
    """The endpoint on a node that gives its managed identity's tokens."""

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        allowed = self.headers.get("secret") == MSI_SECRET
        answer = token(query["resource"][0], "cluster")
        answer |= {"resource": query["resource"][0], "expires_on": str(int(time.time()) + 3600)}
        self.send_response(200 if allowed else 403)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer if allowed else {}).encode())

    def log_message(self, *_) -> None:
        """Keep quiet."""
