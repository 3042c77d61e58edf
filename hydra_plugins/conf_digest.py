"""The resolver `${conf_digest:}`: which conf/ a params.yaml was composed from, and that its values are valid.

DVC imports the modules of hydra_plugins/ before it composes. So a wrong value is refused by
`dvc exp run -S`, also with `--queue`, before anything is queued, written or run.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the dvc command does not look for stages/ here

from stages.core.conf import digest  # noqa: E402
from stages.core.errors import UserError  # noqa: E402
from stages.core.settings import validate  # noqa: E402


def checked_digest(*, _root_: DictConfig) -> str:
    """Return the digest of conf/. Raises `UserError` in one line for a composition that is not valid."""
    composed = _root_.copy()
    with open_dict(composed):
        composed.conf_digest = digest(ROOT / "conf")
    try:
        validate(OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value yet (???): give it with -S") from None
    return composed.conf_digest


OmegaConf.register_new_resolver("conf_digest", checked_digest, replace=True)
