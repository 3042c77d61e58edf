"""Write parameters into conf/, so that it composes to them: options of groups first, then single values.

Comments and the order of lines stay. Raises `UserError` when conf/ cannot be brought to compose to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from stages import params
from stages.core.errors import UserError
from stages.params import flat, values_of

DIGEST = "conf_digest"
Values = dict[str, Any]


def write_into(conf: Path, wanted: Values, name: str) -> list[str]:
    """Change the files in `conf` until they compose to `wanted`; return what was changed, in words."""
    goal = leaves(wanted)
    changes = [choose(conf, group, goal) for group in groups_that_differ(conf, goal)]
    for key in differing(compose(conf), goal):
        if key in goal:
            changes.append(set_value(conf, key, goal[key]))
    if left := differing(compose(conf), goal):
        raise UserError(f"conf/ cannot express {', '.join(left)} of {name}: edit conf/ by hand")
    return [change for change in changes if change]


def compose(conf: Path, *overrides: str) -> Values:
    """Return what a conf/ composes to, flat. Raises `UserError` where it does not."""
    return leaves(values_of(params.compose(overrides, conf)))


def leaves(values: Values) -> Values:
    """Return every value by its dotted name, without the digest of conf/ and empty sections."""
    return {k: v for k, v in flat(values).items() if k != DIGEST and v != {}}


def differing(values: Values, goal: Values) -> list[str]:
    """Return the keys that are not the same in both."""
    missing = object()
    keys = [*goal, *(key for key in values if key not in goal)]
    return [key for key in keys if values.get(key, missing) != goal.get(key, missing)]


def groups_that_differ(conf: Path, goal: Values) -> list[str]:
    """Return the groups whose sections are not what is wanted, in the order of the defaults."""
    sections = {key.partition(".")[0] for key in differing(compose(conf), goal)}
    return [group for group in defaults(conf) if group in sections]


def choose(conf: Path, group: str, goal: Values) -> str:
    """Switch a group to the option that comes nearest to what is wanted."""
    chosen = defaults(conf)[group]
    options = [file.stem for file in sorted((conf / group).glob("*.yaml"))]
    left = {option: distance(conf, f"{group}={option}", goal) for option in options}
    best = min(options, key=lambda option: (left[option], option != chosen))
    if best == chosen:
        return ""
    set_default(conf, group, best)
    return f"{group}={best}"


def distance(conf: Path, override: str, goal: Values) -> float:
    """Return how many values an option leaves to change; no option that asks for more is near."""
    try:
        return len(differing(compose(conf, override), goal))
    except UserError:
        return float("inf")


def defaults(conf: Path) -> dict[str, str]:
    """Return the option of every group in config.yaml."""
    listed = read(conf / "config.yaml")["defaults"]
    return {k: v for entry in listed if isinstance(entry, dict) for k, v in entry.items()}


def set_default(conf: Path, group: str, option: str) -> None:
    """Write another option of a group into config.yaml."""
    config = read(conf / "config.yaml")
    entry = next(e for e in config["defaults"] if isinstance(e, dict) and group in e)
    entry[group] = option
    write(conf / "config.yaml", config)


def set_value(conf: Path, key: str, value: Any) -> str:
    """Write one value where it takes effect: in the default experiment if that sets it, else in its group."""
    chosen = defaults(conf)
    file, path = conf / "config.yaml", key.split(".")
    if path[0] in chosen:
        file, path = conf / path[0] / f"{chosen[path[0]]}.yaml", path[1:]
    experiment = conf / f"experiment/{chosen.get('experiment')}.yaml"
    if experiment.is_file() and key in flat(read(experiment)):
        file, path = experiment, key.split(".")
    values = section = read(file)
    for part in path[:-1]:
        section = section.setdefault(part, {})
    section[path[-1]] = value
    write(file, values)
    return f"{key}={value}"


def read(file: Path) -> Any:
    """Read a YAML file with its comments."""
    return _yaml().load(file.read_text(encoding="utf-8"))


def write(file: Path, values: Any) -> None:
    """Write a YAML file with its comments."""
    with file.open("w", encoding="utf-8") as stream:
        _yaml().dump(values, stream)


def _null(representer: RoundTripRepresenter, _: None) -> ScalarNode:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _yaml() -> YAML:
    kept = YAML()
    kept.preserve_quotes = True
    kept.width = 200
    kept.indent(mapping=2, sequence=4, offset=2)
    kept.representer.add_representer(type(None), _null)
    return kept
