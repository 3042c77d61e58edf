"""Clones of the working tree in which the real pipeline runs on the tiny model.

`finished` has been run once for these files, whatever the number of pytest-xdist workers; two more
went on from there: `with_experiment` tried a setting, `two_commits` made it the default. `project`, `tried`
and `changed` are a test's own copies of them, to run further, change or break.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from support.project import ROOT, Project, clone, working_tree

pytest_plugins = [
    "support.blob_service",  # the fixtures of tests/azure
    "support.browser",
    "support.webgpu",
]

DAY = 24 * 3600
# pytest's workers share the cores: threads would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs the whole pipeline as slow; start the longest test first.

    Started last, it would keep one worker busy alone at the end.
    """
    for item in items:
        if "finished" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of these very files: all pytest-xdist workers see it, and so do later sessions for a day."""
    digest = hashlib.sha256(sys.version.encode())
    for name in working_tree():
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    home = Path(tempfile.gettempdir(), f"olive-lab-tests-{os.getuid()}")
    home.mkdir(mode=0o700, exist_ok=True)
    assert home.stat().st_uid == os.getuid(), f"{home} is somebody else's"
    for old in home.iterdir():
        if time.time() - old.stat().st_mtime > DAY:
            shutil.rmtree(old, ignore_errors=True)
    folder = home / digest.hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def once(shared) -> Callable[[str, Callable[[Path], None]], Path]:
    """Make a folder once: the first worker that asks makes it, the others wait."""

    def make(name: str, maker: Callable[[Path], None]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / f"{name}.made").exists():
                shutil.rmtree(shared / name, ignore_errors=True)
                maker(shared / name)
                (shared / f"{name}.made").touch()
        return shared / name

    return make


@pytest.fixture(scope="session")
def finished(once) -> Project:
    """A clone after a full `dvc repro`, committed. Only read it."""

    def repro(root: Path) -> None:
        project = clone(root)
        project.log.write_text(project.dvc("repro"), encoding="utf-8")
        project.commit()

    return Project(once("finished", repro))


@pytest.fixture(scope="session")
def with_experiment(once, finished) -> Project:
    """A clone after an experiment called `shorter` in a temporary copy of it. Only read it."""

    def experiment(root: Path) -> None:
        project, shorter = finished.copy(root), ["-S", "evaluate.max_new_tokens=6"]
        output = project.dvc("exp", "run", "--temp", "--name", "shorter", *shorter)
        project.log.write_text(output, encoding="utf-8")

    return Project(once("with_experiment", experiment))


@pytest.fixture(scope="session")
def two_commits(once, finished) -> Project:
    """Two commits that differ in one line of conf/ and its results. Only read it."""

    def change(root: Path) -> None:
        project = finished.copy(root)
        project.replace("conf/experiment/shrunk.yaml", "max_new_tokens: 8", "max_new_tokens: 6")
        project.log.write_text(project.dvc("repro"), encoding="utf-8")
        project.commit()

    return Project(once("two_commits", change))


@pytest.fixture
def project(finished, tmp_path) -> Project:
    """A test's own copy of the finished clone."""
    return finished.copy(tmp_path / "project")


@pytest.fixture
def tried(with_experiment, tmp_path) -> Project:
    """A test's own copy of the clone with an experiment."""
    return with_experiment.copy(tmp_path / "tried")


@pytest.fixture
def changed(two_commits, tmp_path) -> Project:
    """A test's own copy of the clone with two commits."""
    return two_commits.copy(tmp_path / "changed")


@pytest.fixture
def fresh(tmp_path) -> Project:
    """A test's own clone in which nothing has run, with an empty cache."""
    return clone(tmp_path / "fresh")


@pytest.fixture
def params() -> dict:
    """What conf/ composes to, to change and validate: params.yaml may hold an experiment's values."""
    from stages.params import compose, values_of

    with contextlib.chdir(ROOT):
        return values_of(compose())
