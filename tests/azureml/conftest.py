"""A cloud for each test session's worker, and a laptop that knows it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.project import Project

from .cloud import REMOTE, Cloud, started


@dataclass(frozen=True)
class Laptop(Project):
    """A clone whose commands see Azure."""

    azure: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        own = {k: v for k, v in super().environment.items() if not k.startswith("AZURE")}
        return {**own, "HOME": str(self.root.parent / f"{self.root.name}.home"), **self.azure}

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
        yield cloud


@pytest.fixture
def cloud(sky) -> Iterator[Cloud]:
    """Azure with nothing in it but what an administrator made; nobody else may have been asked."""
    sky.reset()
    yield sky
    sky.machines.wait()
    assert sky.relay.refused == set()
    assert sky.service.unknown == []


@pytest.fixture
def laptop(finished, cloud, tmp_path) -> Laptop:
    """A clone after a full run, on a machine that is signed in, with a DVC remote of its own."""
    project = finished.copy(tmp_path / "laptop")
    laptop = Laptop(project.root, cloud.laptop)
    laptop.dvc("remote", "modify", "azure", "account_name", REMOTE)
    laptop.dvc("remote", "modify", "azure", "url", f"azure://{cloud.remote_container()}")
    laptop.dvc("remote", "default", "azure")
    laptop.commit()
    return laptop


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
