"""A cache.type of the user's own: links into the cache are named where they cannot work, and left whole."""

import hashlib

import pytest

from support.project import Project

pytestmark = pytest.mark.slow


def relink(project: Project, kind: str) -> None:
    project.dvc("config", "--local", "cache.type", kind)
    project.dvc("checkout", "--relink")


def damaged(project: Project) -> list[str]:
    """Return the objects of the cache that are no longer what their names say."""
    objects = [p for p in (project.root / ".dvc/cache/files/md5").glob("*/*") if p.is_file()]
    assert objects
    names = {path: (path.parent.name + path.name).removesuffix(".dir") for path in objects}
    return [n for path, n in names.items() if hashlib.md5(path.read_bytes()).hexdigest() != n]


def test_weights_behind_links_are_refused_in_one_line_with_the_way_out(project):
    for kind in ("symlink", "hardlink"):
        relink(project, kind)
        output = project.python("lab.cli", "chat", "hello", exits=1)
        assert "is a link, which ONNX Runtime refuses to read" in output
        assert len(output.splitlines()) == 1
    relink(project, "reflink,copy")
    assert project.python("lab.cli", "chat", "--max-new-tokens", "2", "hello")


def test_no_stage_writes_through_a_link_into_the_cache(project):
    relink(project, "symlink")
    project.dvc("repro", "--force", "--single-item", "prepare")
    project.dvc("repro", "--force", "--single-item", "report")
    assert damaged(project) == []
