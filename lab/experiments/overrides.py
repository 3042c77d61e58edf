"""Overrides as people type them: understood, or refused in one line that says how to write them.

check(["finetune.max_steps=200"])      # raises UserError before anything is asked for, stashed or run

`dvc exp run -S` and Hydra take the same words, but refuse them in several lines that name no way out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from os.path import isdir, isfile  # false, not an error, for what is no file name: too long, NUL

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from stages.core.conf import CONF
from stages.core.errors import UserError
from stages.core.settings import PARAMS
from stages.params import Values, compose, flat, text_of, values_of

# processors whose graphs ONNX Runtime GenAI's builder does not make: their names, what is asked of Olive
RECIPES = {
    "openvino": ("Intel's OpenVINO", "OpenVINOExecutionProvider", "*/aitk/*_ov_config.json"),
    "qnn": ("Qualcomm's NPU", "QNNExecutionProvider", "*/QNN"),
    "vitis": ("AMD's NPU", "VitisAIExecutionProvider", "*/VitisAI"),
}


def check(overrides: Sequence[str]) -> None:
    """Raise `UserError` unless conf/ composes with these overrides to valid settings."""
    if not overrides:
        return
    plain = values_of(compose())
    # another option of a group may have other keys: model=local has model.source.path
    known = [*plain, *flat(plain), *(key for text in overrides for key in option_values(text))]
    for text in overrides:
        override = parse(text)
        check_form(override)
        check_key(text, override, known)
    compose(overrides)


def option_values(text: str) -> Values:
    """Return what the option of GROUP=OPTION sets, by dotted names; nothing where there is no such file."""
    group, _, option = text.partition("=")
    file = CONF / group / f"{option}.yaml"
    values = values_of(text_of(file)) if isfile(file) else {}
    return {f"{group}.{key}": value for key, value in flat(values).items()}


def parse(text: str) -> Override:
    """Return one override with one value. Raises `UserError` that says how to write it."""
    override = parse_plainly(text)
    if override.is_sweep_override():
        raise refused(text, f"several values need a queue: dvc exp run --queue -S '{text}'")
    return override


def parse_plainly(text: str) -> Override:
    """Return one override, also one with several values. Raises `UserError` that says how to quote it."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        raise refused(text, f"cannot be read: {way_out(text)}") from None
    if not override.key_or_group:
        raise refused(text, f"cannot be read: {way_out(text)}")
    return override


def refused(text: str, reason: str) -> UserError:
    """Return the refusal of an override in one line: a line break in it is written as an escape."""
    line = f"-S {text}: {reason}"
    return UserError("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def check_form(override: Override) -> None:
    """Raise `UserError` for Hydra's marks where none belong: its own advice fails as well.

    `+experiment=quick` adds a group that the defaults have; in `finetune/rank=8` a slash stands for a dot.
    """
    text, key = str(override.input_line), override.key_or_group
    value = text.partition("=")[2]
    if key in ("optimize", "optimize.execution_provider"):
        refuse_other_pipelines(text, value)
    is_group = isdir(CONF / key)
    if override.is_add() and not override.is_force_add() and (is_group or has(key)):
        raise refused(text, f"{key} exists already: write -S {key}={value}")
    if "/" in key and not is_group:
        group, _, option = key.rpartition("/")
        dotted = key.replace("/", ".")
        if isfile(CONF / group / f"{option}.yaml"):
            raise refused(text, f"write -S {group}={option}")
        raise refused(text, f"{key} is not a group of conf/: write -S {dotted}={value}")


def refuse_other_pipelines(text: str, value: str) -> None:
    """Raise `UserError` for a processor whose graph another pipeline makes, naming that."""
    for name, (processor, provider, place) in RECIPES.items():
        if name in value.lower():
            raise refused(
                text,
                f"a graph for {processor} needs other passes and calibration, which this pipeline does not "
                f"have: Olive's recipes do (github.com/microsoft/olive-recipes, {place}), or `olive optimize "
                f"-m MODEL --device npu --provider {provider}`; docs/devices.md says what of ours runs there",
            )


def has(key: str) -> bool:
    """Say whether params.yaml, composed last, has a key."""
    values = values_of(text_of(PARAMS))
    return key in {*values, *flat(values)}


def way_out(text: str) -> str:
    """Say how an override that Hydra cannot read is written."""
    key, equals, value = text.partition("=")
    group, _, option = text.partition("/")
    if not equals and isfile(CONF / group / f"{option}.yaml"):
        return f"write -S {group}={option}"
    if not equals or not key:
        return "write KEY=VALUE"
    if re.search(r"[^\w.@/+~:]", key):
        return f"{key!r} is no key; did you mean {key.lstrip('-').replace('-', '_')}?"
    escaped = value.strip("'\"").replace("'", "\\'")
    return f"quote the value twice, for the shell and for Hydra: -S \"{key}='{escaped}'\""


def check_key(text: str, override: Override, known: list[str]) -> None:
    """Raise `UserError` for a key or an option of a group that conf/ does not have."""
    key = override.key_or_group
    if isdir(CONF / key):
        check_option(key, override.value())
    elif (
        not (override.is_add() or override.is_delete()) and key not in known and key != "experiment"
    ):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see params.yaml for the keys"
        raise refused(text, f"{key} is not a key; {hint}")


def check_option(group: str, option: object) -> None:
    """Raise `UserError` for an option that a group does not have."""
    options = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    for name in option if isinstance(option, list) else [option]:
        if name is not None and str(name) not in options:
            raise refused(f"{group}={name}", f"conf/{group} has {', '.join(options)}")
