"""Adds the `${conf_digest:}` resolver, so that params.yaml says which conf/ it was composed from.

DVC imports this when it composes (`dvc exp run`, `python -m stages.params`).
"""

import hashlib
from pathlib import Path

from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parent.parent / "conf"


def conf_digest(conf: Path = CONF) -> str:
    """Return 16 hex digits of sha256 over the names and bytes of conf/**/*.yaml."""
    digest = hashlib.sha256()
    for path in sorted(conf.rglob("*.yaml")):
        digest.update(path.relative_to(conf).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


OmegaConf.register_new_resolver("conf_digest", conf_digest, replace=True)
