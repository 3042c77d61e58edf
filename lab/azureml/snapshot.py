"""What a job gets of this repository: the files that git tracks, as they are now, less .amlignore."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from lab.git import git_output
from lab.overrides import check
from stages.errors import UserError
from stages.params import is_current, recompose

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
        shown = ", ".join(untracked[:3]) + (", …" if len(untracked) > 3 else "")
        print(f"Not sent, git does not track them: {shown}", file=sys.stderr)
    return code


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
    git_output("update-ref", f"refs/lab/{job}", git_output("stash", "create") or head)
    return head
