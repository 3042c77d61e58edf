"""Git, as the commands of `lab` ask it.

git_output("rev-parse", "HEAD")
"""

from __future__ import annotations

import subprocess

from stages.core.errors import UserError


def git_output(*words: str) -> str:
    """Return what a git command prints. Raises `UserError` with git's reason where it fails."""
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError:
        raise UserError("git is not installed, or not on the PATH") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [
            f"exit code {done.returncode}, without a word"
        ]
        reasons = [line for line in said if line.startswith(("fatal: ", "error: "))]
        raise UserError(f"git {words[0]}: {(reasons or said)[-1]}")  # below it git gives advice
    return done.stdout.strip()


def need_commit() -> None:
    """Raise `UserError` where there is no git repository, or no commit in it yet."""
    git_output("rev-parse", "--git-dir")
    asked = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    if subprocess.run(asked, capture_output=True).returncode:
        raise UserError("no commit here yet: make the first with `git add .` and `git commit`")


def need_identity() -> None:
    """Raise `UserError` where git has no name and address to sign with; it would say so after the work.

    What git makes up of user and host does not count: gto does not take it.
    """
    asked = ["git", "-c", "user.useConfigOnly=true", "var", "GIT_COMMITTER_IDENT"]
    if subprocess.run(asked, capture_output=True).returncode:
        raise UserError(
            "git does not know who you are: git config user.name NAME, git config user.email ADDRESS"
        )
