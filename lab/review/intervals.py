"""How sure a difference is: the bootstrap of stages/scoring/bootstrap.py over both revisions (Koehn 2004).

Both get the same draws where they were asked the same prompts, so that what is hard for both cancels out.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from stages.scoring.bootstrap import SEED, Interval, draw, middle

Row = dict[str, Any]


def intervals(before: list[Row], after: list[Row]) -> dict[str, Interval]:
    """Return, for every metric made of prompts, the 95 % interval of its change."""
    if not before or not after:
        return {}
    earlier, later = by_key(before), by_key(after)
    paired = earlier.keys() == later.keys()
    rows = [earlier[key] for key in later] if paired else list(earlier.values())
    old = draw(rows, np.random.default_rng(SEED))
    new = draw(list(later.values()), np.random.default_rng(SEED if paired else SEED + 1))
    return {name: middle(new[name] - old[name]) for name in new.keys() & old.keys()}


def same_prompts(before: list[Row], after: list[Row]) -> bool:
    """Say whether two revisions were asked the same."""
    return by_key(before).keys() == by_key(after).keys()


def by_key(rows: list[Row]) -> dict[Hashable, Row]:
    """Return rows by what makes a prompt the same prompt."""
    return {(row["kind"], row["question"], row["reference"]): row for row in rows}
