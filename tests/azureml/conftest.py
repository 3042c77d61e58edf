"""A cloud for each test session's worker, and a laptop that knows it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.processes import HANGS
from support.project import Project

from . import warm
from .cloud import CONTAINER, REMOTE, Cloud, started


@dataclass(frozen=True)
class Laptop(Project):
    """A clone whose commands see Azure."""

    azure: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        own = {k: v for k, v in super().environment.items() if not k.startswith("AZURE")}
        return {**own, "HOME": str(self.root.parent / f"{self.root.name}.home"), **self.azure}

    def python(self, *words: str, exits: int = 0) -> str:
        """Run `python -m ...` in the clone, as a process that has the large packages already."""
        output = self.root.with_name(f"{self.root.name}.{uuid.uuid4().hex}.log")
        code = warm.python(words, self.root, self.environment, output, HANGS)
        said = output.read_text(encoding="utf-8")
        assert code == exits, f"{' '.join(words)}: {code}\n{said}"
        return said

    def lab(self, *words: str, **options) -> str:
        """Run `lab ...` in the clone."""
        return self.python("lab.cli", *words, **options)

    def but(self, **changed: str | None) -> Laptop:
        """Return the same clone with other environment variables; None takes one away."""
        azure = {**self.azure, **changed}
        return Laptop(self.root, {k: v for k, v in azure.items() if v is not None})


@pytest.fixture(scope="session")
def sky(tmp_path_factory) -> Iterator[Cloud]:
    """Azure, started once for each of pytest's workers."""
    with started(tmp_path_factory.mktemp("cloud") / "azure") as cloud:
        warm.start(cloud.network)
        yield cloud


@pytest.fixture
def cloud(sky) -> Iterator[Cloud]:
    """Azure with nothing in it but what an administrator made; nobody else may have been asked."""
    sky.reset()
    yield sky
    sky.machines.wait()
    assert sky.relay.refused == set()
    assert sky.service.unknown == []


@pytest.fixture(scope="session")
def with_remote(once, finished) -> Project:
    """A clone after a full run whose committed settings name the DVC remote. Only read it."""

    def settle(root: Path) -> None:
        project = finished.copy(root)
        project.dvc("remote", "modify", "azure", "account_name", REMOTE)
        project.dvc("remote", "modify", "azure", "url", f"azure://{CONTAINER}")
        project.dvc("remote", "default", "azure")
        project.commit()

    return Project(once("with_remote", settle))


@pytest.fixture
def laptop(with_remote, cloud, tmp_path) -> Laptop:
    """A clone after a full run, on a machine that is signed in."""
    return Laptop(with_remote.copy(tmp_path / "laptop").root, cloud.laptop)


@pytest.fixture
def network(cloud, monkeypatch) -> Cloud:
    """This process itself, signed in and behind the relay."""
    for name in [name for name in os.environ if name.startswith("AZURE")]:
        monkeypatch.delenv(name)
    for name, value in cloud.laptop.items():
        monkeypatch.setenv(name, value)
    return cloud


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by their names."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
