"""Register in git: a gto tag for each artefact that dvc.yaml lists under `artifacts:`.

lab register --git
dvc push && git push --tags                              # share the version
dvc artifacts get . ft-for-travel --rev v1.0.0           # bring the model of a version back
dvc artifacts get . ft-for-travel-adapter --rev v1.0.0   # and its adapter
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from lab.git import git_output, need_identity
from stages.core.errors import UserError

SHARE = "dvc push && git push --tags shares it"


def register(name: str, version: int | None, tags: dict[str, str]) -> None:
    """Tag HEAD as a version of the model and of its adapter; resumes where an earlier run broke off."""
    need_identity()
    known = {each: registered(each) for each in artifacts_of(name)}
    content = tags["content_sha256"]
    number = version or version_of(content, known)
    if any(versions.get(number, content) != content for versions in known.values()):
        raise UserError(
            f"{name} v{number}.0.0 exists and holds another model: bump the version, "
            f"--version {following(known)}"
        )
    missing = [each for each, versions in known.items() if number not in versions]
    for each in missing:
        create_tag(each, number, tags)
    if missing:
        print(f"Registered {' and '.join(missing)} as v{number}.0.0: {SHARE}")
    else:
        print(f"{name} v{number}.0.0 holds this very content: nothing to do")


def version_of(content: str, known: dict[str, dict[int, str]]) -> int:
    """Return the version that holds this content, if only in part; the next one where there is none."""
    same = [n for versions in known.values() for n, held in versions.items() if held == content]
    return same[0] if same else following(known)


def following(known: dict[str, dict[int, str]]) -> int:
    """Return the version after the last."""
    return max((n for versions in known.values() for n in versions), default=0) + 1


def artifacts_of(name: str) -> list[str]:
    """Return the names under `artifacts:` that make up a model: its adapter's and, last, its own."""
    listed = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8")).get("artifacts", {})
    names = [f"{name}-adapter", name]
    if missing := [each for each in names if each not in listed]:
        raise UserError(
            f"dvc.yaml lists no {' and no '.join(missing)} under artifacts: add what to register in git"
        )
    return names


def registered(name: str) -> dict[int, str]:
    """Return the content of every version that git has a tag of."""
    lines = git_output("for-each-ref", "--format=%(refname:short)", f"refs/tags/{name}@v*").split()
    versions = {}
    for tag in lines:
        number = tag.rpartition("@v")[2].split(".")[0]
        message = git_output("tag", "--list", "--format=%(contents)", tag)
        if number.isdigit():
            versions[int(number)] = message_content(message)
    return versions


def message_content(message: str) -> str:
    """Return the content that a tag's message names, empty for a tag that is not ours."""
    try:
        return json.loads(message).get("content_sha256", "")
    except ValueError:
        return ""


def create_tag(name: str, number: int, tags: dict[str, str]) -> None:
    """Register HEAD with gto; the tag's message says what Azure ML's tags say."""
    from gto.api import register as gto_register
    from gto.exceptions import GTOException

    try:
        gto_register(
            ".", name, "HEAD", version=f"v{number}.0.0", message=json.dumps(tags, indent=2)
        )
    except GTOException as error:
        raise UserError(f"gto: {' '.join(str(error).split())}") from None
