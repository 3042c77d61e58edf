"""An Azurite for each pytest worker, a container for each test, and small pipelines that use it.

make test-azure

The faults concern DVC's way to the remote, not models, so most tests run a pipeline of two stages
that write random bytes; `test_machines.py` runs the real one on the tiny model.
"""

from __future__ import annotations

import contextlib
import random
import select
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from azure.storage.blob import (
    AccountSasPermissions,
    ContainerClient,
    ResourceTypes,
    generate_account_sas,
)

from lab.remote import azurite as emulator
from stages.core.errors import UserError
from support.processes import output_of
from support.project import ROOT, Project

if TYPE_CHECKING:
    from azureml.cloud import Cloud

FILES = 24
BYTES = 200_000  # of each file
DVC_YAML = """\
stages:
  make:
    cmd: python make.py models/base 24
    params: [bytes]
    deps: [make.py]
    outs: [models/base]
  summarize:
    cmd: python make.py models/small 1
    params: [steps]
    deps: [make.py, models/base]
    outs: [models/small, result.bin]
"""
MAKE_PY = """\
import random, sys, time
from pathlib import Path
import yaml
from stages.core.parent import die_with_dvc
from stages.core.files import written_beside

die_with_dvc()  # as stages/__init__.py does for a real stage
settings = yaml.safe_load(Path("params.yaml").read_text())
with written_beside(sys.argv[1]) as folder:
    folder.mkdir()
    while Path("hold").exists():  # for as long as a test wants the stage to run
        time.sleep(0.05)
    for number in range(int(sys.argv[2])):
        dice = random.Random(f"{sys.argv} {settings} {number}")
        (folder / f"{number}.bin").write_bytes(dice.randbytes(settings["bytes"]))
if sys.argv[1] == "models/small":
    Path("result.bin").write_bytes(dice.randbytes(100))
"""


@dataclass
class Azurite:
    """A Blob service on loopback."""

    program: Path
    data: Path
    port: int
    process: subprocess.Popen | None = None

    def start(self) -> Azurite:
        try:
            self.process = emulator.serve(self.program, self.data, self.port, own_session=False)
        except UserError as error:
            log = self.data / "azurite.log"
            raise RuntimeError(f"{error}\n{log.read_text() if log.exists() else ''}") from None
        return self

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def connection_string(self) -> str:
        return emulator.connection_string(self.port)


def account_sas(permission: str, account: str = emulator.ACCOUNT, key: str = emulator.KEY) -> str:
    """Return a SAS token for an hour."""
    return generate_account_sas(
        account,
        key,
        ResourceTypes(service=True, container=True, object=True),
        AccountSasPermissions.from_string(permission),
        datetime.now(UTC) + timedelta(hours=1),
    )


@dataclass(frozen=True)
class Container:
    """A test's own container."""

    azurite: Azurite
    name: str

    @property
    def client(self) -> ContainerClient:
        return ContainerClient.from_connection_string(self.azurite.connection_string, self.name)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every blob."""
        return {blob.name: blob.size for blob in self.client.list_blobs()}

    def objects(self) -> dict[str, int]:
        """Return the bytes of DVC's objects, by their hash."""
        names = self.sizes().items()
        return {"".join(n.split("/")[2:]): size for n, size in names if n.startswith("files/md5/")}

    def blob(self, md5: str):
        return self.client.get_blob_client(f"files/md5/{md5[:2]}/{md5[2:]}")

    def settings(self, **values: str) -> str:
        """Return the text of a .dvc/config.local; by default with Azurite's own key."""
        values = values or {"connection_string": self.azurite.connection_string}
        lines = {"url": f"azure://{self.name}", **values}.items()
        remote = "".join(f"    {key} = {value}\n" for key, value in lines)
        return f"[core]\n    remote = azure\n['remote \"azure\"']\n{remote}"

    def connect(self, project: Project, **values: str) -> Project:
        """Point a clone's local settings at this container."""
        (project.root / ".dvc/config.local").write_text(self.settings(**values), encoding="utf-8")
        return project


class Line(socketserver.ThreadingTCPServer):
    """The network between a machine and Azurite: breaks once it has carried that many bytes.

    A line that is "cut" ends every connection, one that is "silent" takes them and carries nothing.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, azurite: Azurite, way: str, after: int) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.azurite, self.way, self.left = azurite, way, after
        self.broken, self.mended = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def connection_string(self) -> str:
        return emulator.connection_string(self.server_address[1])

    def carry(self, size: int) -> None:
        """Note what was carried."""
        self.left -= size
        if self.left <= 0:
            self.broken.set()

    def mend(self) -> None:
        self.mended.set()


class Connection(socketserver.BaseRequestHandler):
    """One connection through a line."""

    server: Line

    def handle(self) -> None:
        azurite = ("127.0.0.1", self.server.azurite.port)
        with socket.create_connection(azurite) as far, contextlib.suppress(OSError):
            while self.fine and self.pass_on({self.request: far, far: self.request}):
                pass
        if not self.fine and self.server.way == "silent":
            self.server.mended.wait()

    @property
    def fine(self) -> bool:
        return self.server.mended.is_set() or not self.server.broken.is_set()

    def pass_on(self, across: dict[socket.socket, socket.socket]) -> bool:
        """Carry what has come from either side to the other; return whether both are still there."""
        for ready in select.select(list(across), [], [], 0.1)[0]:
            data = ready.recv(1 << 14)
            if not data:
                return False
            across[ready].sendall(data)
            self.server.carry(len(data))
        return True


@pytest.fixture
def line(lasting) -> Iterator[Callable[..., Line]]:
    """Lays lines to the lasting Azurite; they end with the test."""
    laid: list[Line] = []

    def lay(way: str, after: int) -> Line:
        laid.append(Line(lasting, way, after))
        return laid[-1]

    yield lay
    for each in laid:
        each.mend()
        each.shutdown()
        each.server_close()


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port on which nobody listens, and nobody can."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def free_port() -> int:
    """Return a port that nobody listens on, below those that the kernel hands to whoever asks for any."""
    ports = random.SystemRandom().sample(range(15000, 30000), 100)
    return next(port for port in ports if not emulator.is_open(port))


@pytest.fixture(scope="session")
def program() -> Path:
    """Azurite as `make test-azure` installed it."""
    return emulator.install(ROOT / emulator.HOME)


@pytest.fixture(scope="session")
def lasting(program, tmp_path_factory) -> Iterator[Azurite]:
    """The worker's Azurite, which nobody stops."""
    running = on_a_free_port(program, tmp_path_factory.mktemp("azurite"))
    yield running
    running.stop()


def on_a_free_port(program: Path, data: Path) -> Azurite:
    """Start an Azurite; on another port when somebody was faster to take the first."""
    for _ in range(5):
        try:
            return Azurite(program, data, free_port()).start()
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error) and "is taken" not in str(error):
                raise
    raise RuntimeError("five free ports were taken in a row")


@pytest.fixture(scope="session")
def cloud(tmp_path_factory) -> Iterator[Cloud]:
    """Azure's own host names, behind which an Azurite answers."""
    from azureml.cloud import started  # most tests ask for no cloud

    with started(tmp_path_factory.mktemp("cloud") / "azure") as cloud:
        yield cloud


@pytest.fixture
def reaches_azure(cloud, monkeypatch) -> None:
    """Let this machine, and the commands that it starts, reach that Azure."""
    for name, value in cloud.network.items():
        monkeypatch.setenv(name, value)


def new_container(azurite: Azurite) -> Container:
    container = Container(azurite, f"test-{uuid.uuid4().hex[:12]}")
    container.client.create_container()
    return container


@pytest.fixture
def container(lasting) -> Container:
    """A test's own container in the lasting Azurite."""
    return new_container(lasting)


def settings(steps: int, size: int = BYTES) -> str:
    """Return a params.yaml of the small pipeline."""
    return f"bytes: {size}\nsteps: {steps}\n"


def small_pipeline(root: Path) -> Project:
    """Make a repository with a pipeline of two stages and this repository's DVC settings."""
    (root / ".dvc").mkdir(parents=True)
    for name in (".dvc/config", ".dvc/.gitignore", ".gitattributes"):
        shutil.copy(ROOT / name, root / name)
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "make.py").write_text(MAKE_PY)
    (root / "params.yaml").write_text(settings(steps=1))
    (root / ".gitignore").write_text("/models/\n/result.bin\n")
    project = Project(root)
    project.git("init", "--quiet", "--initial-branch=main")
    project.commit()
    return project


@pytest.fixture(scope="session")
def made(once) -> Project:
    """The small pipeline after `dvc repro`. Only read it."""

    def make(root: Path) -> None:
        project = small_pipeline(root)
        project.dvc("repro")
        project.commit()

    return Project(once("small", make))


@pytest.fixture
def laptop(made, container, tmp_path) -> Project:
    """A test's copy of the small pipeline's clone, whose remote is the test's empty container."""
    return container.connect(made.copy(tmp_path / "laptop"))


@pytest.fixture(scope="session")
def once_pushed(made, lasting, tmp_path_factory) -> dict[str, bytes]:
    """The blobs by name that a push of the small pipeline sends."""
    container = new_container(lasting)
    laptop = container.connect(made.copy(tmp_path_factory.mktemp("once") / "laptop"))
    laptop.dvc("push", "--run-cache")
    return {name: container.client.download_blob(name).readall() for name in container.sizes()}


@pytest.fixture
def pushed(once_pushed, container) -> Container:
    """The test's container as the laptop's push leaves it."""
    for name, content in once_pushed.items():
        container.client.upload_blob(name, content)
    return container


@pytest.fixture
def colleague(laptop, pushed, tmp_path) -> Project:
    """Another machine's clone of the laptop's repository, with an empty cache, on the same remote."""
    return pushed.connect(cloned(laptop, tmp_path / "colleague"))


def cloned(project: Project, root: Path, *options: str) -> Project:
    """Return what `git clone` makes: no cache, no outputs, no local settings.

    It speaks the protocol of a server: a path alone would be copied, whatever --depth says.
    """
    project.git("clone", "--quiet", *options, f"file://{project.root}", str(root))
    return Project(root)


def lab(project: Project, *words: str, exits: int = 0) -> str:
    """Run `lab ...` in a clone."""
    return project.run(sys.executable, "-m", "lab.cli", *words, exits=exits)


def start(project: Project, *words: str) -> subprocess.Popen:
    """Start `lab ...` in a clone."""
    return project.start(sys.executable, "-m", "lab.cli", *words)


def wait_until(happens: Callable[[], object], process: subprocess.Popen) -> None:
    """Wait for what a process does; fail at once when it ends without having done it."""
    deadline = time.monotonic() + 120
    while not happens():
        ended = process.poll() is not None
        if (ended and not happens()) or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"did not happen; the process said:\n{output_of(process)}")
        time.sleep(0.05)
