"""The digest of conf/, which params.yaml carries: so that anyone can tell whether it is current."""

from __future__ import annotations

import hashlib
from pathlib import Path

CONF = Path("conf")


def digest(conf: Path = CONF) -> str:
    """Return 16 hex digits of sha256 over the names and texts of conf/**/*.yaml, line ends aside."""
    sha256 = hashlib.sha256()
    for path in sorted(conf.rglob("*.yaml")):  # names too: a renamed option composes otherwise
        text = path.read_bytes().replace(b"\r\n", b"\n")
        sha256.update(path.relative_to(conf).as_posix().encode() + b"\0" + text + b"\0")
    return sha256.hexdigest()[:16]
