"""Clones in unusual places: what others computed is restored there, what is new computed and shared."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.blob_service import Container, Project, cloned, lab, settings
from support.project import stages_that_ran

pytestmark = pytest.mark.azure


def shallow(origin: Project, root: Path) -> Project:
    return cloned(origin, root, "--depth", "1")


def worktree(origin: Project, root: Path) -> Project:
    cloned(origin, root.with_name("main")).git(
        "worktree", "add", "--quiet", "-b", "side", str(root)
    )
    return Project(root)


def detached(origin: Project, root: Path) -> Project:
    project = cloned(origin, root)
    project.git("checkout", "--quiet", "--detach")
    return project


def submodule(origin: Project, root: Path) -> Project:
    outer = Project(root)
    root.mkdir()
    outer.git("init", "--quiet")
    allow = ("-c", "protocol.file.allow=always")
    outer.git(*allow, "submodule", "--quiet", "add", f"file://{origin.root}", "inner")
    return Project(root / "inner")


def with_spaces_and_accents(origin: Project, root: Path) -> Project:
    return cloned(origin, root.with_name("un été à la mer, 100 %"))


def with_line_ends_of_windows(origin: Project, root: Path) -> Project:
    return cloned(origin, root, "--config", "core.autocrlf=true")


@pytest.mark.parametrize(
    "place",
    [
        shallow,
        worktree,
        detached,
        submodule,
        with_spaces_and_accents,
        with_line_ends_of_windows,
    ],
)
def test_a_clone_restores_computes_and_shares(
    place: Callable, laptop: Project, pushed: Container, tmp_path
):
    there = pushed.connect(place(laptop, tmp_path / "there"))
    restored = lab(there, "dvc", "repro", "--pull", "--allow-missing")
    assert stages_that_ran(restored) == []
    assert there.git("status", "--short") == ""
    (there.root / "params.yaml").write_text(settings(steps=2))
    assert stages_that_ran(lab(there, "run")) == ["summarize"]
    assert "0 of them" in lab(there, "fsck", "--deep")
    assert there.git("status", "--short").split() == ["M", "dvc.lock", "M", "params.yaml"]


def test_a_clone_that_was_moved_goes_on_where_it_was(laptop, pushed, tmp_path):
    laptop.dvc("status")
    there = Project(laptop.root.rename(tmp_path / "there"))
    assert stages_that_ran(lab(there, "run")) == []
    assert "up to date" in there.dvc("status")
    shutil.rmtree(there.root / "models")
    there.dvc("checkout")
    assert "up to date" in there.dvc("status")


def test_a_cache_that_users_share_spares_them_the_remote(laptop, container, tmp_path):
    shared = f"[cache]\n    dir = {tmp_path}/shared\n    shared = group\n"
    machines = [cloned(laptop, tmp_path / name) for name in ("one", "other")]
    for machine in machines:
        (machine.root / ".dvc/config.local").write_text(container.settings() + shared)
    one, other = machines
    assert stages_that_ran(one.dvc("repro")) == ["make", "summarize"]
    assert stages_that_ran(other.dvc("repro")) == []
    assert "up to date" in other.dvc("status")
    assert (tmp_path / "shared/files/md5").stat().st_mode & 0o070 == 0o070
    lab(other, "dvc", "push")
    assert "0 of them" in lab(other, "fsck")
