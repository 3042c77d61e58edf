"""What `dvc exp run` is asked for, checked before anything is stashed, queued or run.

    check(["exp", "run", "--queue", "--name", "a", "-S", "finetune.rank=8"])     # raises UserError

hydra_plugins/exp_run.py calls it for plain dvc, where a mistake would be told late or never: a queued
experiment finds out in a copy of the repository that a file is missing there, and one with a name that is
taken replaces the other's result without a word.
"""

from __future__ import annotations

import os
import subprocess
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from lab.experiments.overrides import check_form, parse_plainly, refused
from lab.git import git_output
from stages.core.errors import UserError
from stages.core.settings import PARAMS
from stages.params import flat, text_of, values_of

# settings that name files of the user's own
FILES = ("data.path", "model.source.path", "model.source.corpus")


def check(words: Sequence[str]) -> None:
    """Raise `UserError` for a request of `dvc exp run` that would fail, or lose something, later."""
    from dvc.cli.parser import get_main_parser

    asked = get_main_parser().parse_args([*words])
    overrides = list(overrides_of(asked.set_param))
    for override in overrides:
        check_form(override)
    if asked.queue or asked.tmp_dir:
        check_files(overrides, asked.copy_paths or ())
    if asked.name and not asked.force:
        check_names(asked, overrides)


def overrides_of(words: Sequence[str]) -> Iterator[Override]:
    """Return what -S sets in params.yaml, without the file's name, which dvc allows in front."""
    for word in words or ():
        file, colon, rest = word.partition(":")
        yield parse_plainly(rest if colon and file == PARAMS.name else word)


def check_files(overrides: Sequence[Override], copied: Sequence[str] = ()) -> None:
    """Raise for a file that a run in a copy of the repository will not find, as git does not know it."""
    values = flat(values_of(text_of(PARAMS)))
    asked = {override.key_or_group: list(texts_of(override)) for override in overrides}
    groups = {key.split("/")[0] for key in asked}
    for key in FILES:
        # a value of params.yaml may be of another option than the one that is asked for
        default = [] if key.split(".")[0] in groups else [values.get(key)]
        for path in asked.get(key, default):
            if path and path not in copied and not is_known(Path(path)):
                way_out = "git add" if key == "data.path" else "dvc exp run --copy-paths"
                if way_out == "git add" and is_ignored(path):
                    way_out = "git add --force"
                raise UserError(
                    f"{path} is not in git, and this run sees only what is in git: {way_out} {path}"
                )


def texts_of(override: Override) -> Iterator[str]:
    """Return the value of an override, or each of several."""
    if override.is_sweep_override():
        try:
            yield from (text.strip("'\"") for text in override.sweep_string_iterator())
        except HydraException:
            raise refused(
                str(override.input_line), "glob and interval list no values: write them, KEY=A,B"
            ) from None
    else:
        yield str(override.value())


def is_known(path: Path) -> bool:
    """Say whether git or DVC has a file, or files below a folder.

    One that does not exist is told elsewhere, and an absolute path means the same in every copy.
    """
    if not os.path.exists(path) or path.is_absolute():  # false for a name that is too long
        return True
    tracked = git_output("ls-files", "--", str(path), f"{path}.dvc")
    return bool(tracked)


def is_ignored(path: str) -> bool:
    """Say whether .gitignore names a file."""
    return subprocess.run(["git", "check-ignore", "--quiet", path]).returncode == 0


def check_names(asked: Namespace, overrides: Sequence[Override]) -> None:
    """Raise for a name that a queued or running experiment has; of finished ones DVC tells by itself."""
    sweep = any(override.is_sweep_override() for override in overrides)
    for name, state in taken_names().items():
        number = name.removeprefix(f"{asked.name}-")
        if name == asked.name or (sweep and name != number and number.isdigit()):
            raise UserError(
                f"experiment {name} is {state} already, and one of this name would replace it: give "
                f"another --name, or --force to replace it, or `dvc queue remove {name}`"
            )


def taken_names() -> dict[str, str]:
    """Return the names of experiments that have not ended, and in which state each is."""
    from dvc.repo import Repo

    with Repo() as repo:
        queue = repo.experiments.celery_queue
        found = {entry.name: "running" for entry in queue.iter_active() if entry.name}
        return found | {entry.name: "queued" for entry in queue.iter_queued() if entry.name}
