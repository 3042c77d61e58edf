"""Git, as the commands of `lab` ask it.

git_output("rev-parse", "HEAD")
"""

from __future__ import annotations

import subprocess

from stages.errors import UserError


def git_output(*words: str) -> str:
    """Return what a git command prints. Raises `UserError` with its last words."""
    done = subprocess.run(["git", *words], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [
            f"exit code {done.returncode}, without a word"
        ]
        raise UserError(f"git {words[0]}: {said[-1]}")
    return done.stdout.strip()


def need_identity() -> None:
    """Raise `UserError` where git has no name and address to sign with; it would say so after the work.

    What git makes up of user and host does not count: gto does not take it.
    """
    asked = ["git", "-c", "user.useConfigOnly=true", "var", "GIT_COMMITTER_IDENT"]
    if subprocess.run(asked, capture_output=True).returncode:
        raise UserError(
            "git does not know who you are: git config user.name NAME, git config user.email ADDRESS"
        )
