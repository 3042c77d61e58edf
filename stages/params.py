"""Bring params.yaml up to conf/ before any stage works.

    python -m stages.params            # the first stage of `dvc repro`
    python -m stages.params --strict   # the commit hook: params.yaml is exactly what conf/ says

`dvc exp run` always composes params.yaml from conf/, plain `dvc repro` never does. So params.yaml carries the
digest of the conf/ that it came from: while that holds, the file is left alone and the overrides of
`dvc exp run -S` live; once conf/ has changed, it is composed again, and the same run continues with it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.core.conf import CONF, digest
from stages.core.errors import UserError
from stages.core.files import written_beside
from stages.core.running import be_quiet, one_line_errors
from stages.core.settings import PARAMS, load

DONE = Path("params.ok")  # its text never changes: fetch and prepare depend on it to come later
Values = dict[str, Any]


def guard() -> None:
    """Compose params.yaml again if conf/ has changed; check it either way."""
    if not is_current():
        if "DVC_EXP_NAME" in os.environ:  # just composed by DVC, from files that this copy lacks
            raise UserError("conf/ has files that git does not track: git add conf, then run again")
        old, new = recompose()
        if data_path(old) not in (None, data_path(new)):
            DONE.unlink(missing_ok=True)  # the next run must not skip this stage
            raise UserError("data.path changed after DVC had read it: run dvc repro again")
    load()
    DONE.write_text("params.yaml belongs to conf/\n", encoding="utf-8")


def is_current() -> bool:
    """Say whether params.yaml was composed from conf/ as it is now, with overrides or without."""
    return values_of(text_of(PARAMS)).get("conf_digest") == digest()


def recompose() -> tuple[Values, Values]:
    """Compose params.yaml again and print what changed; return the values before and after."""
    old, composed = values_of(text_of(PARAMS)), compose()
    with written_beside(PARAMS) as beside:
        beside.write_text(composed, encoding="utf-8")
    new = values_of(composed)
    usable = data_path(old) is not None  # else it was missing, or a merge broke it
    print("\n".join(differences(old, new)) if usable else f"{PARAMS}: composed from {CONF}/")
    return old, new


def check_strictly() -> None:
    """Raise unless params.yaml is exactly what conf/ composes to."""
    composed = compose()
    if text_of(PARAMS) != composed:
        changes = differences(values_of(text_of(PARAMS)), values_of(composed))
        raise UserError(
            "params.yaml is not what conf/ composes to: put its overrides into conf/, or delete it and "
            "run python -m stages.params\n" + "\n".join(changes)
        )


def compose(overrides: Sequence[str] = (), conf: Path = CONF) -> str:
    """Return the text that conf/ composes to, by DVC's own composer. Raises `UserError` for nonsense."""
    from dvc.utils.hydra import compose_and_dump  # stages load fast without it
    from hydra.errors import HydraException

    with tempfile.TemporaryDirectory() as folder:
        composed = Path(folder, PARAMS.name)
        try:
            compose_and_dump(str(composed), str(conf.resolve()), None, "config", ".", [*overrides])
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"conf/ does not compose: {in_one_line(error)}") from None
        return composed.read_text(encoding="utf-8")


def differences(old: Values, new: Values) -> list[str]:
    """Return one line per changed value: `finetune.max_steps: 100 -> 200`."""
    before, after = flat(old), flat(new)
    keys = [*after, *(key for key in before if key not in after)]
    return [
        f"{key}: {before.get(key, 'missing')} -> {after.get(key, 'missing')}"
        for key in keys
        if before.get(key, "missing") != after.get(key, "missing")
    ]


def flat(values: Values, above: str = "") -> Values:
    """Return nested values by their dotted names."""
    found: Values = {}
    for key, value in values.items():
        deeper = isinstance(value, dict) and value
        found |= flat(value, f"{above}{key}.") if deeper else {f"{above}{key}": value}
    return found


def data_path(values: Values) -> Any:
    """Return the one value that dvc.yaml itself depends on."""
    return (values.get("data") or {}).get("path")


def text_of(path: Path) -> str:
    """Return a file's text, empty where there is no file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def values_of(text: str) -> Values:
    """Return the values of a params.yaml, none where a merge left it unreadable."""
    try:
        values: Any = OmegaConf.to_container(
            OmegaConf.create(text)
        )  # as stages do: 1e-6 is a number
    except (yaml.YAMLError, OmegaConfBaseException):
        return {}
    return values if isinstance(values, dict) else {}


def in_one_line(error: Exception) -> str:
    """Return the first lines of Hydra's and OmegaConf's messages, which continue with tracebacks."""
    ours: BaseException | None = error
    while ours is not None and not isinstance(ours, UserError):
        ours = ours.__cause__ or ours.__context__
    return " ".join(line.strip() for line in str(ours or error).splitlines()[:2])


def main() -> None:
    """Guard, or check strictly."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strict", action="store_true", help="allow no overrides either")
    be_quiet()
    with one_line_errors("params"):
        check_strictly() if parser.parse_args().strict else guard()


if __name__ == "__main__":
    main()
