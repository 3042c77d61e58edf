"""The job's image is one that can be built again: pinned, from what the context holds, with our lock."""

from __future__ import annotations

import re
import shlex
import tomllib
from itertools import pairwise

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from lab.azureml import snapshot
from support.project import ROOT

BASE = re.compile(r"python:(?P<version>\d+\.\d+\.\d+)-\S+@sha256:[0-9a-f]{64}")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def context(tmp_path, monkeypatch):
    """The build context that lab submit sends."""
    monkeypatch.chdir(ROOT)
    return snapshot.environment(tmp_path)


@pytest.fixture
def steps(context) -> list[list[str]]:
    """The Dockerfile's instructions in words, comments and broken lines undone."""
    lines = (context / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line]


def words_of(steps: list[list[str]], instruction: str) -> list[list[str]]:
    return [words for first, *words in steps if first == instruction]


def test_the_base_is_pinned_by_digest_and_has_a_python_that_we_support(steps):
    ((base,),) = words_of(steps, "FROM")
    pinned = BASE.fullmatch(base)
    assert pinned, f"not a Python image with its full version and digest: {base}"
    assert Version(pinned["version"]) in SpecifierSet(PROJECT["project"]["requires-python"])


def test_it_installs_the_gpu_lock_and_azures_and_the_context_holds_nothing_else(steps, context):
    ((*sources, target),) = words_of(steps, "COPY")
    assert {*sources, "Dockerfile"} == {file.name for file in context.iterdir()}
    (pip,) = [words for words in words_of(steps, "RUN") if words[:2] == ["pip", "install"]]
    installed = [word for before, word in pairwise(pip) if before == "-r"]
    assert installed == [f"{target}{name}" for name in ("cuda.txt", "azure.txt")]
    for name in sources:
        assert (context / name).read_bytes() == (ROOT / "requirements" / name).read_bytes()


def test_it_has_git_a_compiler_and_the_driver_of_its_node(steps):
    (apt,) = [words for words in words_of(steps, "RUN") if words[0] == "apt-get"]
    assert {"git", "gcc", "libc6-dev"} <= {*apt}
    settings = dict(word.split("=", 1) for words in words_of(steps, "ENV") for word in words)
    assert settings["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert {"compute", "utility"} <= {*settings["NVIDIA_DRIVER_CAPABILITIES"].split(",")}


def test_an_installed_package_has_its_dockerfile():
    assert snapshot.DOCKERFILE.name in PROJECT["tool"]["setuptools"]["package-data"]["*"]
