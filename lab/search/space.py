"""The space of a search: what each setting may be, as people type it, checked before anything runs.

parse(["finetune.rank=8,16,32", "finetune.lr=1e-4..1e-2:log", "quantize=awq,rtn"])

A point is one value per axis. Every listed value, and both ends of every range, must compose with conf/ to
valid settings; all else is refused in one line.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import isdir
from typing import Any

from hydra.errors import HydraException

from lab.experiments import overrides
from stages.core.conf import CONF
from stages.core.errors import UserError
from stages.params import compose, flat, values_of

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"(?P<key>[^=]+)=(?P<low>{NUMBER})\.\.(?P<high>{NUMBER})(?::(?P<kind>.*))?")
SPLIT = "evaluate.split"
LOOKED_AT = (
    f"{SPLIT}=validation"  # what trials are asked; the winner alone is asked the test prompts
)
ON_TEST = f"{SPLIT}=test"
DIGITS = (
    3  # of a value from a range: what is more is in no setting's nature, and repeats under no name
)
# what decides how trials are compared: it must be the same for all of them
FIXED = {
    "evaluate": "trials are compared by it",
    "data": "trials must be asked the same prompts",
    "model": "another model has other layers and limits: search on each",
}
Point = tuple[Any, ...]


@dataclass(frozen=True)
class Axis:
    """A setting or a group of conf/, and what it may be: listed values, or a range."""

    key: str
    values: tuple[Any, ...] = ()  # as an override is written; empty for a range
    low: float = 0
    high: float = 0
    log: bool = False
    whole: bool = False

    @property
    def is_group(self) -> bool:
        """Whether its values are options of conf/."""
        return isdir(CONF / self.key)

    @property
    def count(self) -> float:
        """How many values there are; infinite for a range of real numbers."""
        if self.values:
            return len(self.values)
        return self.high - self.low + 1 if self.whole else math.inf

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that are checked before anything runs."""
        return self.values or (self.number(self.low), self.number(self.high))

    def number(self, value: float) -> int | float:
        """Return a value of the range as it is set: whole, or with few digits."""
        if self.whole:
            return round(value)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def every(self) -> tuple[Any, ...]:
        """Return all values of an axis that has so few."""
        return self.values or tuple(range(int(self.low), int(self.high) + 1))

    def override(self, value: Any) -> str:
        """Return a value as an override of `dvc exp run -S`."""
        return f"{self.key}={value}"

    def place_of(self, setting: Any) -> Any:
        """Return which value of this axis a setting in params.yaml is, None where it is none."""
        if self.values:
            return next((value for value in self.values if same(value, setting)), None)
        if isinstance(setting, bool) or not isinstance(setting, int | float):
            return None
        value = self.number(setting)
        inside = self.low <= setting <= self.high
        return value if inside and value == setting else None


@dataclass(frozen=True)
class Space:
    """All points that a search may try."""

    axes: tuple[Axis, ...]

    @cached_property
    def size(self) -> float:
        """How many points there are."""
        return math.prod(axis.count for axis in self.axes)

    def overrides(self, point: Point) -> list[str]:
        """Return a point as words of -S; options of groups come first, as Hydra wants it."""
        pairs = zip(self.axes, point, strict=True)
        return [
            axis.override(value) for axis, value in sorted(pairs, key=lambda p: not p[0].is_group)
        ]

    def words(self, point: Point) -> str:
        """Return a point as people read it, in the order in which the axes were given."""
        return " ".join(a.override(value) for a, value in zip(self.axes, point, strict=True))

    def points(self, outermost: Sequence[Axis]) -> Iterator[Point]:
        """Yield every point of a finite space; what is outermost changes last."""
        order = [self.axes.index(axis) for axis in outermost]
        for values in itertools.product(*(axis.every() for axis in outermost)):
            found = dict(zip(order, values, strict=True))
            yield tuple(found[place] for place in range(len(self.axes)))


def same(value: Any, setting: Any) -> bool:
    """Say whether a listed value, as typed, and a setting of params.yaml are one."""
    return flat(values_of(f"v: {value}")) == flat({"v": setting})


def parse(words: Sequence[str]) -> Space:
    """Return the space that some words describe. Raises `UserError` for the first that is wrong."""
    if not words:
        raise UserError(
            "nothing to search: give settings with their values, as in finetune.rank=8,16,32"
        )
    axes: list[Axis] = []
    for word in words:
        axis = parse_axis(word)
        if any(other.key == axis.key for other in axes):
            raise UserError(
                f"{axis.key} is given twice: write all its values into one, {axis.key}=A,B,C"
            )
        check(axis)
        axes.append(axis)
    return Space(tuple(axes))


def parse_axis(word: str) -> Axis:
    """Return one axis: KEY=A,B,C or KEY=LOW..HIGH[:log]."""
    if ".." in word.partition("=")[2] and "[" not in word:
        return parse_range(word)
    try:
        override = overrides.parse_plainly(word)
        key = override.key_or_group
        if override.is_sweep_override():
            values = tuple(override.sweep_string_iterator())
        else:
            values = (word.partition("=")[2].strip(),)
    except HydraException:
        raise UserError(f"{word}: write the values as {word.partition('=')[0]}=A,B,C") from None
    except UserError as error:
        raise UserError(str(error).removeprefix("-S ")) from None
    if override.is_add() or override.is_delete():
        raise UserError(f"{word}: a search sets what is there: write KEY=A,B,C without {word[0]}")
    if repeated := [value for value in values if values.count(value) > 1]:
        raise UserError(f"{word}: {repeated[0]} stands there twice")
    return Axis(key, values)


def parse_range(word: str) -> Axis:
    """Return an axis of numbers between two. Raises `UserError` for what is no range."""
    found = RANGE.fullmatch(word)
    if not found:
        raise UserError(
            f"{word}: a range is KEY=LOW..HIGH or KEY=LOW..HIGH:log, both plain numbers"
        )
    texts = (found["low"], found["high"])
    low, high = map(float, texts)
    if found["kind"] not in (None, "log"):
        raise UserError(f"{word}: after a range there may be :log, not :{found['kind']}")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{word}: the lower end comes first: {found['key']}={texts[1]}..{texts[0]}")
    if found["kind"] and low <= 0:
        raise UserError(
            f"{word}: a log range cannot hold 0 or less: begin above 0, or leave out :log"
        )
    whole = all(re.fullmatch(r"[-+]?\d+", text) for text in texts) and not is_real(found["key"])
    return Axis(found["key"], (), low, high, log=bool(found["kind"]), whole=whole)


def is_real(key: str) -> bool:
    """Say whether a setting is a real number now: then 0..1 means all that is between."""
    return isinstance(flat(values_of(compose())).get(key), float)


def check(axis: Axis) -> None:
    """Raise `UserError` for a setting that is not to be searched, or a value that conf/ does not take."""
    section = axis.key.partition(".")[0]
    if section in FIXED:
        raise UserError(f"{axis.key} cannot be searched: {FIXED[section]}")
    if axis.key.rpartition(".")[2] == "seed":
        raise UserError(
            f"{axis.key} cannot be searched: a seed is luck; `lab noise` measures how much"
        )
    for value in axis.ends:
        try:
            overrides.check([axis.override(value)])
        except UserError as error:
            raise UserError(str(error).removeprefix("-S ")) from None
