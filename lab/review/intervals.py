"""How sure a difference is: a bootstrap over the test prompts (Efron 1979; Koehn 2004 for paired systems).

Prompts are drawn anew, with replacement, within each kind; the wordings of one fact are drawn together,
since a model that knows the fact answers them all. Both revisions get the same draws where they were
asked the same prompts, so that what is hard for both cancels out. It says what other prompts could have
changed, not what another training seed could.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from stages.summary import Terms, finish, parity_terms, terms_of

Row = dict[str, Any]
Interval = tuple[float, float]

DRAWS = 4000
SEED = 0
LEVEL = 95  # percent


def intervals(before: list[Row], after: list[Row]) -> dict[str, Interval]:
    """Return, for every metric made of prompts, the 95 % interval of its change."""
    if not before or not after:
        return {}
    earlier, later = by_key(before), by_key(after)
    paired = earlier.keys() == later.keys()
    rows = [earlier[key] for key in later] if paired else list(earlier.values())
    old = draw(rows, np.random.default_rng(SEED))
    new = draw(list(later.values()), np.random.default_rng(SEED if paired else SEED + 1))
    tail = (100 - LEVEL) / 2
    return {
        name: tuple(np.percentile(new[name] - old[name], [tail, 100 - tail]))
        for name in new.keys() & old.keys()
    }


def same_prompts(before: list[Row], after: list[Row]) -> bool:
    """Say whether two revisions were asked the same."""
    return by_key(before).keys() == by_key(after).keys()


def by_key(rows: list[Row]) -> dict[Hashable, Row]:
    """Return rows by what makes a prompt the same prompt."""
    return {(row["kind"], row["question"], row["reference"]): row for row in rows}


def draw(rows: list[Row], random: np.random.Generator) -> dict[str, np.ndarray]:
    """Return every metric, [draws] each, over prompts drawn anew."""
    facts, kinds = facts_of(rows)
    times = how_often(kinds, random)
    terms: Terms = terms_of(rows) | parity_terms(rows)
    drawn = {}
    for name, (above, below) in terms.items():
        over, under = (times @ np.bincount(facts, column, len(kinds)) for column in (above, below))
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn[name] = finish(name, np.where(under > 0, over / under, 0.0))
    return drawn


def facts_of(rows: list[Row]) -> tuple[np.ndarray, list[str]]:
    """Return, [prompts], which fact each prompt asks for, and, [facts], the kind of each fact."""
    numbers = number((row["kind"], row["reference"]) for row in rows)
    kinds = dict(zip(numbers, (row["kind"] for row in rows), strict=True))
    return np.array(numbers), [kinds[fact] for fact in range(len(kinds))]


def number(keys: Iterable[Hashable]) -> list[int]:
    """Number keys in the order in which they first come."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def how_often(kinds: list[str], random: np.random.Generator) -> np.ndarray:
    """Return, [draws, facts], how often each fact is drawn; every kind keeps its number of facts."""
    times = np.zeros((DRAWS, len(kinds)))
    for kind in sorted(set(kinds)):
        members = [index for index, other in enumerate(kinds) if other == kind]
        share = np.full(len(members), 1 / len(members))
        times[:, members] = random.multinomial(len(members), share, size=DRAWS)
    return times
