"""npm packages at the versions that a package-lock.json of ours pins, each with its digest."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from stages.core.errors import UserError

PINS = ("package.json", "package-lock.json")
# what npm has fetched before is not fetched again; without a network the wait is seconds
COMMAND = (
    "npm ci --omit=dev --ignore-scripts --no-audit --no-fund --prefer-offline --fetch-retries=1 "
    "--fetch-retry-mintimeout=1000 --loglevel=error"
)
NO_NETWORK = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ENETUNREACH", "ETIMEDOUT", "ENOTCACHED")


def need_node(what: str, again: str) -> None:
    """Raise unless Node.js and npm are here."""
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"{what} needs Node.js, and {' and '.join(missing)} cannot be found: install Node.js 18 or "
            f"newer (https://nodejs.org or your system's packages), then run {again} again"
        )


def install(pins: Path, home: Path, what: str) -> Path:
    """Install what a folder pins into `home`, by no script of theirs; return the folder of the packages."""
    home.mkdir(parents=True, exist_ok=True)
    for name in PINS:
        shutil.copyfile(pins / name, home / name)
    done = subprocess.run(COMMAND.split(), cwd=home, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["npm said nothing"])[0]
        if any(word in reason for word in NO_NETWORK):
            reason += ": its registry cannot be reached (npm config get registry)"
        raise UserError(f"npm could not install {what}: {reason}")
    return home / "node_modules"
