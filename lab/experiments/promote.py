"""Promote an experiment: its parameters become the defaults in conf/, its results this commit's.

lab promote solid-bach                               # writes conf/, applies the results, commits
lab promote solid-bach --no-commit                   # leaves the commit to you

conf/ must compose to exactly the experiment's parameters before anything in the workspace changes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from dvc.repo import Repo

from lab.experiments.edits import write_into
from lab.git import git_output, need_commit, need_identity
from stages import params
from stages.core.errors import UserError

OURS = ("conf", "params.yaml", "dvc.lock", "metrics")


@dataclass(frozen=True)
class Experiment:
    """An experiment as DVC keeps it: a git commit on top of the commit that it was started from."""

    name: str
    ref: str
    baseline: str


def promote(
    experiment: Annotated[str, typer.Argument(help="A name from `lab exp`.")],
    commit: Annotated[bool, typer.Option(help="Commit the result.")] = True,
) -> None:
    """Make an experiment the default. Its parameters go into conf/, its results come along."""
    need_commit()
    if not Path("dvc.yaml").is_file():
        raise UserError("no dvc.yaml here: run it in the repository's root")
    if commit:
        need_identity()
    found = find(experiment)
    refuse_to_overwrite(found)
    refuse_without_results(found)
    refuse_trial(found)
    with tempfile.TemporaryDirectory() as scratch:
        conf = Path(shutil.copytree(params.CONF, Path(scratch, "conf")))
        changes = write_into(conf, parameters(found), found.name)
        apply(found, conf)
    for change in changes:
        print(change)
    if commit:
        git_output("commit", "--quiet", "--message", message(found, changes))
        print(f"committed as {git_output('rev-parse', '--short', 'HEAD')}")


def find(name: str) -> Experiment:
    """Find an experiment by its name. Raises `UserError` when there is none, or more than one."""
    refs = git_output("for-each-ref", "--format=%(refname)", "refs/exps").splitlines()
    named = [ref.split("/") for ref in refs if ref.endswith(f"/{name}") and ref.count("/") == 4]
    head = git_output("rev-parse", "HEAD")
    found = [Experiment(name, "/".join(parts), parts[2] + parts[3]) for parts in named]
    here = [experiment for experiment in found if experiment.baseline == head]
    if not found:
        raise UserError(f"{name} is not an experiment of this repository: `lab exp -A` lists them")
    if not here:
        raise UserError(
            f"{name} was run on commit {found[0].baseline[:7]}, not on this one: "
            "run it again here, or check that commit out"
        )
    refuse_edited_code(here[0])
    return here[0]


def refuse_edited_code(experiment: Experiment) -> None:
    """Raise if the experiment ran with other edits than of parameters: a commit of ours lacks them."""
    files = git_output(
        "diff", "--name-only", "--relative", "-z", experiment.baseline, experiment.ref, "--"
    ).split("\0")
    if edited := [file for file in filter(None, files) if file.partition("/")[0] not in OURS]:
        raise UserError(
            f"{experiment.name} ran with an edited {', '.join(edited[:3])}: "
            "commit that edit, then run the experiment again on it"
        )


def refuse_to_overwrite(experiment: Experiment) -> None:
    """Raise unless what git tracks is as it was committed."""
    if dirty := git_output("status", "--porcelain", "--untracked-files=no"):
        changed = ", ".join(line[2:].strip() for line in dirty.splitlines()[:3])
        raise UserError(
            f"uncommitted changes ({changed}): commit them, or `git restore .`, "
            f"before {experiment.name} is promoted"
        )


def refuse_without_results(experiment: Experiment) -> None:
    """Raise unless the cache has the results: `dvc exp apply` would seek them in the remote, silently."""
    with Repo() as repo, repo.switch(experiment.ref):
        missing = [str(o) for o in repo.index.outs if o.use_cache and o.changed_cache()]
    if missing:
        remote = (git_output("remote").splitlines() or ["GIT_REMOTE"])[0]
        raise UserError(
            f"{', '.join(missing[:3])} of {experiment.name} are not in this clone's cache: "
            f"`lab dvc exp pull {remote} {experiment.name}` brings them, or run it again"
        )


def refuse_trial(experiment: Experiment) -> None:
    """Raise for a trial of a search: its figures are of the prompts that it was chosen by."""
    values = parameters(experiment)
    if values.get("evaluate", {}).get("split") == "validation":
        raise UserError(
            f"{experiment.name} was asked the validation prompts, as a trial of `lab search` is: run it on "
            "the test prompts, -S evaluate.split=test, and promote that experiment"
        )


def parameters(experiment: Experiment) -> dict[str, Any]:
    """Return the parameters that the experiment ran with."""
    return yaml.safe_load(git_output("show", f"{experiment.ref}:./params.yaml"))


def apply(experiment: Experiment, conf: Path) -> None:
    """Bring the results, put the new conf/ in place and tell DVC; undo it all when a part fails."""
    try:
        dvc("exp", "apply", experiment.name)
        shutil.copytree(conf, params.CONF, dirs_exist_ok=True)
        params.PARAMS.write_text(params.compose(), encoding="utf-8")
        dvc("repro", "params")
        git_output("add", "--", *OURS)
    except BaseException:
        # nothing was uncommitted: refuse_to_overwrite
        git_output("reset", "--quiet", "--hard", "HEAD")
        raise


def message(experiment: Experiment, changes: list[str]) -> str:
    """Return what the commit says."""
    return "\n".join([f"Promote experiment {experiment.name}", "", *changes])


def dvc(*words: str) -> None:
    """Run DVC. Raises `UserError` with the reason why it fails."""
    done = subprocess.run([sys.executable, "-m", "dvc", *words], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["?"]
        errors = [line for line in said if line.startswith("ERROR: ")]  # below it DVC gives advice
        reason = (errors or said)[-1].removeprefix("ERROR: ")
        raise UserError(f"dvc {' '.join(words)}: {reason}")
