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
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, without a word"]
        raise UserError(f"git {words[0]}: {said[-1]}")
    return done.stdout.strip()
