"""How sure a difference is: the bootstrap of stages/scoring/bootstrap.py over both revisions (Koehn 2004).

Both get the same draws where they were asked the same prompts, so that what is hard for both cancels out.
"""

from __future__ import annotations

import numpy as np

from stages.scoring.bootstrap import SEED, Interval, draw, middle
from stages.scoring.predictions import Prediction


def intervals(before: list[Prediction], after: list[Prediction]) -> dict[str, Interval]:
    """Return, for every metric made of prompts, the 95 % interval of its change."""
    if not before or not after:
        return {}
    earlier, later = by_key(before), by_key(after)
    paired = earlier.keys() == later.keys()
    old_ones = [earlier[key] for key in later] if paired else list(earlier.values())
    # the same seed draws the same prompts for both, so that a hard prompt counts against both or neither
    old = draw(old_ones, np.random.default_rng(SEED))
    new = draw(list(later.values()), np.random.default_rng(SEED if paired else SEED + 1))
    return {name: middle(new[name] - old[name]) for name in new.keys() & old.keys()}


def same_prompts(before: list[Prediction], after: list[Prediction]) -> bool:
    """Say whether two revisions were asked the same."""
    return by_key(before).keys() == by_key(after).keys()


def by_key(predictions: list[Prediction]) -> dict[tuple[str, str, str], Prediction]:
    """Return predictions by what makes a prompt the same prompt."""
    return {prediction.key: prediction for prediction in predictions}
