"""`python -m MODULE` without the seconds in which Python imports Azure's library and DVC.

A server process imports them once and forks for each command. A command is a process like any other, with a
folder, an environment and output of its own, and it imports the code of its own clone.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import psutil

TESTS = Path(__file__).resolve().parents[1]
# not dvc.cli: hydra_plugins tell by it that a dvc command is running
PACKAGES = [
    "azure.ai.ml.entities",
    "azure.identity",
    "dvc.repo.experiments",
    "gto",
    "hydra",
    "networkx",
    "ruamel.yaml",
    "typer",
]
FORKS = multiprocessing.get_context("forkserver")


def start(environment: Mapping[str, str]) -> None:
    """Start the server, in the environment of the network: aiohttp reads certificates as it is imported."""
    FORKS.set_forkserver_preload(PACKAGES)
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()


def python(
    words: tuple[str, ...], folder: Path, environment: Mapping[str, str], output: Path, hangs: float
) -> int | str:
    """Run `python -m WORDS`, its output to a file; return the exit code, or that it did not end in time."""
    process = FORKS.Process(target=become, args=(words, folder, dict(environment), output))
    process.start()
    process.join(hangs)
    if process.exitcode is not None:
        return process.exitcode
    family = psutil.Process(process.pid)
    for member in [*family.children(recursive=True), family]:
        member.kill()
    return f"not done after {hangs} s"


def become(words: tuple[str, ...], folder: Path, environment: dict[str, str], output: Path) -> None:
    """Turn this forked process into the command."""
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # the clone in place of the working tree, where pytest found this module
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p) not in (TESTS, TESTS.parent))]
    sys.argv, sys.dont_write_bytecode = list(words), True
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
