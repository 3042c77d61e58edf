"""Guard params.yaml: it must be what conf/ composes to, give or take `dvc exp run -S` overrides.

    python -m stages.params            # the first stage of dvc.yaml
    python -m stages.params --strict   # the commit hook: no overrides either

`dvc repro` never recomposes conf/, `dvc exp run` always does. So params.yaml carries a digest of conf/.
When it matches, the file is left alone and `-S` overrides survive; otherwise conf/ was edited, and the
file is composed again, its changes shown, and the run stopped, since DVC has already read the old one.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from dvc.utils.hydra import compose_and_dump
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from stages.errors import UserError
from stages.running import be_quiet, one_line_errors, written_beside
from stages.settings import PARAMS, load

CONF = Path("conf")


def compose(overrides: Sequence[str] = ()) -> str:
    """Return the text that conf/ composes to, by DVC's own composer."""
    with tempfile.TemporaryDirectory() as folder:
        composed = Path(folder, PARAMS.name)
        try:
            compose_and_dump(str(composed), str(CONF.resolve()), None, "config", ".", [*overrides])
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"conf/ does not compose: {_first_lines(error)}") from None
        load(composed)
        return composed.read_text(encoding="utf-8")


def guard() -> None:
    """Leave a current params.yaml alone; compose a stale one again and stop."""
    composed = compose()
    if _digest(_text()) == _digest(composed):
        load()
        return
    reason = "conf/ changed" if _digest(_text()) else "it was missing or unreadable"
    changes = differences(composed)
    with written_beside(PARAMS) as beside:
        beside.write_text(composed, encoding="utf-8")
    raise UserError(
        f"{reason}, so params.yaml was composed again: run dvc repro again\n{changes}".rstrip()
    )


def check_strictly() -> None:
    """Raise unless params.yaml is exactly what conf/ composes to."""
    if changes := differences(compose()):
        raise UserError(
            "params.yaml is not what conf/ composes to: put its overrides into conf/, "
            f"or run `python -m stages.params` to compose it again\n{changes}"
        )


def differences(composed: str) -> str:
    """Return the changed lines from params.yaml to `composed`, empty when there are none."""
    lines = difflib.unified_diff(_text().splitlines(), composed.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def _text() -> str:
    return PARAMS.read_text(encoding="utf-8", errors="replace") if PARAMS.is_file() else ""


def _digest(text: str) -> str | None:
    """Return the digest that a params.yaml carries, None where a merge left it unreadable."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return values.get("conf_digest") if isinstance(values, dict) else None


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:2])


def main() -> None:
    """Guard, or check strictly with --strict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--strict", action="store_true", help="params.yaml must equal conf/ exactly"
    )
    arguments = parser.parse_args()
    be_quiet()
    with one_line_errors("params"):
        check_strictly() if arguments.strict else guard()
    print("params: params.yaml is current", file=sys.stderr)


if __name__ == "__main__":
    main()
