"""Run what changed on this machine, and share it: check, pull what is needed, compute, push.

lab run                                    # dvc repro
lab run -S finetune.max_steps=200          # dvc exp run
lab run -S model=phi35_mini --name phi     # a name for the experiment

It prints the dvc commands that it runs; they do the same when typed by hand.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from lab import doctor
from lab.remote import config
from stages.core.errors import UserError


def run(
    stages: Annotated[
        list[str] | None, typer.Argument(help="Only these and what they need [default: all].")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "-S", "--set-param", metavar="KEY=VALUE", help="As in `dvc exp run`, repeatable."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The experiment's name [default: random].")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Files on their way at once [default: .dvc/config's].")
    ] = None,
) -> None:
    """Run what changed here, and push it. Pulls what the stages need first."""
    if overrides:
        from lab.experiments.overrides import check  # half a second of Hydra

        check(overrides)
    preflight()
    name = name or (random_name() if overrides else None)
    push = ["push", "--run-cache", *(["--jobs", str(jobs)] if jobs else [])]
    with pushing_also_after(push):
        compute(overrides or [], stages or [], name)
    dvc(*push)
    if name:
        push_experiment(name)


def compute(overrides: list[str], stages: list[str], name: str | None) -> None:
    """Run what changed: as an experiment where it has a name, in the workspace otherwise."""
    if name:
        settings = [word for override in overrides for word in ("-S", override)]
        dvc("exp", "run", "--pull", "--allow-missing", "--name", name, *settings, *stages)
    else:
        dvc("repro", "--pull", "--allow-missing", *stages)


@contextlib.contextmanager
def pushing_also_after(push: list[str]) -> Iterator[None]:
    """Push the finished stages also when a later one fails, or when the machine is taken away (SIGTERM)."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("lab: terminated"))
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(UserError):  # what failed first is what the user hears of
            dvc(*push)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def preflight() -> None:
    """Raise `UserError` for what would otherwise be found out after the computing."""
    found = config.load()
    found.check()
    found.check_writing()
    doctor.disk()


def push_experiment(name: str) -> None:
    """Send the experiment's commit to the git remote, for the others to apply."""
    git = subprocess.run(["git", "remote"], capture_output=True, text=True).stdout.split()
    if not git:
        print(f"No git remote: experiment {name} stays in this clone (its artefacts are pushed)")
        return
    origin = "origin" if "origin" in git else git[0]
    dvc("exp", "push", "--no-cache", origin, name)
    print(
        f"Elsewhere: dvc exp pull --no-cache {origin} {name}, then dvc exp branch {name} BRANCH "
        "and git switch BRANCH; dvc pull fetches the models"
    )


def random_name() -> str:
    """Return a name as `dvc exp run` would give."""
    from dvc.repo.experiments.utils import gen_random_name

    return gen_random_name()


def dvc(*words: str) -> None:
    """Print a dvc command and run it; its failure is ours."""
    print(f"$ {shlex.join(['dvc', *words])}", flush=True)
    done = subprocess.run([sys.executable, "-m", "lab.remote.watched_dvc", *words])
    if done.returncode:
        raise UserError(
            f"dvc {words[0]} failed (above); nothing is lost, and the same command continues from there"
        )
