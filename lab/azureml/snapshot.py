"""What a job gets of this repository: the files that git tracks, as they are now, less .amlignore."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import yaml

from lab.experiments.overrides import check
from lab.experiments.request import FILES
from lab.git import git_output
from stages.core.errors import UserError
from stages.params import Values, compose, flat, is_current, recompose, values_of

# what a job reads beside what dvc.yaml names, and what .amlignore keeps back with reason
STARTING = {".dvc/config", "dvc.yaml", "dvc.lock", "params.yaml", "pyproject.toml", "lab", "stages"}
NOT_NEEDED = {"tests", "benchmarks", "docs", "azurite"}
LOCKS = ("cuda.txt", "azure.txt")
DOCKERFILE = Path(__file__).with_name("Dockerfile")


def bring_params_up_to_date(overrides: list[str]) -> None:
    """Compose params.yaml again if conf/ was edited, and refuse overrides that do not compose."""
    if not is_current():
        recompose()
    check(overrides)


def take(folder: Path) -> Path:
    """Copy what git tracks; return the copy, which Azure's SDK filters by its .amlignore."""
    code = folder / "olive-lab"
    for name in filter(None, git_output("ls-files", "-z").split("\0")):
        if Path(name).is_file():  # else deleted here, and not yet from git
            (code / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(name, code / name)
    if untracked := git_output("ls-files", "--others", "--exclude-standard").splitlines():
        print(f"Not sent, git does not track them: {in_short(untracked)}", file=sys.stderr)
    return code


def check_ignored(overrides: list[str]) -> None:
    """Say which tracked files .amlignore keeps back; raise for one without which the job fails on its node.

    Azure's SDK leaves them out without a word. That tests, docs and the like stay at home is meant.
    """
    from azure.ai.ml._utils._asset_utils import get_ignore_file  # the SDK's own reading of it

    values = flat(values_of(compose(overrides)))
    ignore, needed = get_ignore_file(Path.cwd()), inputs_of_a_job(values)
    tracked = [name for name in git_output("ls-files", "-z").split("\0") if Path(name).is_file()]
    check_tracked(values, tracked)
    held_back = [name for name in tracked if ignore.is_file_excluded(Path(name))]
    for name in held_back:
        if any(f"{name}/".startswith(f"{path}/") for path in needed):
            raise UserError(
                f".amlignore keeps {name} back, which the job needs: take out the pattern that names it"
            )
    if others := [name for name in held_back if name.split("/")[0] not in NOT_NEEDED]:
        print(f"Not sent, .amlignore names them: {in_short(others)}", file=sys.stderr)


def check_tracked(values: Values, tracked: list[str]) -> None:
    """Raise for a file or folder of the user's own that a job would not get, as git does not know it."""
    for path in filter(None, (values.get(key) for key in FILES)):
        if not any(f"{name}/".startswith(f"{path}/") for name in tracked):
            raise UserError(
                f"{path} is not in git, and a job gets only what is in git: git add {path}"
            )


def inputs_of_a_job(values: Values) -> set[str]:
    """Return the files and folders in git that a job reads: what starts it, and what its stages depend on."""
    stages = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
    return STARTING | {
        values["data.path"] if "data.path" in dep else dep
        for stage in stages
        for dep in stage["deps"]
    }


def in_short(names: list[str]) -> str:
    """Return the first names."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def environment(folder: Path) -> Path:
    """Lay out the Docker build context of the job's environment: the same lock gives the same one."""
    context = folder / "environment"
    context.mkdir()
    shutil.copyfile(DOCKERFILE, context / "Dockerfile")
    for name in LOCKS:
        shutil.copyfile(Path("requirements", name), context / name)
    return context


def remember(job: str) -> str:
    """Keep the tracked files as they are now under refs/lab/JOB; return the commit they build on."""
    try:
        head = git_output("rev-parse", "--verify", "HEAD")
    except UserError:
        raise UserError("git has no commit here: commit first") from None
    # without it, a file with a new date and the old content makes `git stash create` fail without a word
    git_output("update-index", "-q", "--refresh")
    git_output("update-ref", f"refs/lab/{job}", git_output("stash", "create") or head)
    return head
