"""Run a folder's server on this machine: in Docker where that runs, else as a process of its own.

run(Path("server"), Path("models"), 8000)
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lab.serve.command import DRAIN, listening_socket, need_packages
from stages.core.errors import UserError

HOST = "127.0.0.1"
IMAGE = "olive-lab-server"
LOCKED_UP = ["--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
PLACES = ("LAB_MODEL", "LAB_HOST", "LAB_PORT")  # in the container, as its image has them


def run(folder: Path, model: Path, port: int) -> int:
    """Serve until Ctrl-C or SIGTERM; return the exit code. Raises `UserError` for what is missing."""
    listening_socket(HOST, port).close()  # a port that is taken is told before an image is built
    if not any(model.glob("**/genai_config.json")):
        raise UserError(f"{model} holds no ONNX model: --model, or run `dvc repro` or `dvc pull`")
    if docker_runs():
        return in_docker(folder, model, port)
    print(
        "No Docker here: the folder's server as a plain process, with this Python's packages",
        flush=True,
    )
    return as_process(folder, model, port)


def docker_runs() -> bool:
    """Say whether there is a Docker that answers."""
    asked = ["docker", "info", "--format", "{{.ServerVersion}}"]
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(asked, capture_output=True, timeout=10).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def in_docker(folder: Path, model: Path, port: int) -> int:
    """Build the image and run it. Raises `UserError` without a key, or where the build fails."""
    if not os.environ.get("LAB_API_KEY"):
        raise UserError(
            "a container listens beyond its loopback and needs a key: "
            'export LAB_API_KEY="$(openssl rand -hex 16)"'
        )
    if subprocess.run(["docker", "build", "--quiet", "--tag", IMAGE, str(folder)]).returncode:
        raise UserError(f"docker build {folder} failed: its last lines above say why")
    settings = [
        name for name in sorted(os.environ) if name.startswith("LAB_") and name not in PLACES
    ]
    return follow(
        ["docker", "run", "--rm", "--publish", f"{HOST}:{port}:8000", *LOCKED_UP,
         *(word for name in settings for word in ("--env", name)),  # by name: words are seen by others
         "--volume", f"{model.resolve()}:/model:ro", "--stop-timeout", str(DRAIN + 5), IMAGE],
        folder,
        os.environ,
    )  # fmt: skip


def as_process(folder: Path, model: Path, port: int) -> int:
    """Run the folder's modules with this Python, with no home and none of this shell's environment."""
    need_packages()
    with tempfile.TemporaryDirectory() as home:
        environment = {
            "PATH": os.defpath,
            "HOME": home,
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **{name: value for name, value in os.environ.items() if name.startswith("LAB_")},
            "LAB_MODEL": str(model.resolve()),
            "LAB_HOST": HOST,
            "LAB_PORT": str(port),
        }
        return follow([sys.executable, "-m", "lab.deploy.server"], folder / "app", environment)


def follow(command: list[str], folder: Path, environment: Mapping[str, str]) -> int:
    """Run a command to its end, and hand it the signals that would end this one; return its exit code."""
    # a session of its own: Ctrl-C reaches it once, from here
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True) as process:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: process.send_signal(received))
        return process.wait()
