"""How sure a difference between two revisions is, as far as the test prompts go.

Shares of prompts: by the prompts that only one of the two has right, where both were asked the same
(`paired_change`), else by the interval of each (`unpaired_change`). All other metrics: the bootstrap of
stages/scoring/bootstrap.py over both (Koehn 2004). What is hard for both revisions cancels out.
"""

from __future__ import annotations

from math import sqrt

import numpy as np

from stages.scoring.bootstrap import SEED, all_terms, draw, facts_of, middle
from stages.scoring.predictions import Prediction
from stages.scoring.proportions import Interval, Z, design_effect, is_share, share

Term = tuple[np.ndarray, np.ndarray]


def intervals(before: list[Prediction], after: list[Prediction]) -> dict[str, Interval]:
    """Return, for every metric made of prompts, the 95 % interval of its change."""
    if not before or not after:
        return {}
    earlier, later = by_key(before), by_key(after)
    paired = earlier.keys() == later.keys()
    old = [earlier[key] for key in later] if paired else list(earlier.values())
    new = list(later.values())
    # the same seed draws the same prompts for both, so that a hard prompt counts against both or neither
    drawn_old = draw(old, np.random.default_rng(SEED))
    drawn_new = draw(new, np.random.default_rng(SEED if paired else SEED + 1))
    terms_old, terms_new = all_terms(old), all_terms(new)
    facts_old, facts_new = facts_of(old)[0], facts_of(new)[0]
    found = {}
    for name in drawn_new.keys() & drawn_old.keys():
        if not is_share(name):
            found[name] = middle(drawn_new[name] - drawn_old[name])
        elif paired:
            found[name] = paired_shares(terms_old[name], terms_new[name], facts_new)
        else:
            found[name] = unpaired_change(
                *of_one(terms_old[name], facts_old), *of_one(terms_new[name], facts_new)
            )
    return found


def paired_shares(old: Term, new: Term, facts: np.ndarray) -> Interval:
    """Return the interval of a share's change over the same prompts, [prompts] in each term."""
    asked = (old[1] > 0) & (new[1] > 0)
    change = (new[0] - old[0])[asked]
    # prompts of one fact count as fewer independent ones
    weight = 1 / design_effect(change, facts[asked])
    gained, lost = (change > 0).sum() * weight, (change < 0).sum() * weight
    return paired_change(float(gained), float(lost), float(asked.sum() * weight))


def paired_change(gained: float, lost: float, count: float) -> Interval:
    """Return the interval of the change of a proportion over `count` pairs, by those that differ.

    The adjusted Wald interval of Bonett and Price (2012, J. Educ. Behav. Stat. 37:479), after Agresti
    and Min (2005): one pair is added to either kind, so that it has a width where no pair differs.
    """
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = Z * sqrt((up + down - (up - down) ** 2) / (count + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def of_one(term: Term, facts: np.ndarray) -> tuple[float, Interval]:
    """Return a share of prompts with its interval."""
    right, asked = term
    asked = asked > 0
    value = float(right[asked].mean()) if asked.any() else 0.0
    return value, share(right[asked], facts[asked])


def unpaired_change(old: float, around_old: Interval, new: float, around_new: Interval) -> Interval:
    """Return the interval of the difference of two independent proportions, from the interval of each.

    Method 10 of Newcombe (1998, Statistics in Medicine 17:873), Wilson's limits squared and added.
    """
    change = new - old
    return (
        change - sqrt((new - around_new[0]) ** 2 + (around_old[1] - old) ** 2),
        change + sqrt((around_new[1] - new) ** 2 + (old - around_old[0]) ** 2),
    )


def same_prompts(before: list[Prediction], after: list[Prediction]) -> bool:
    """Say whether two revisions were asked the same."""
    return by_key(before).keys() == by_key(after).keys()


def in_both(before: list[Prediction], after: list[Prediction]) -> int:
    """Return how many prompts two revisions share."""
    return len(by_key(before).keys() & by_key(after).keys())


def by_key(predictions: list[Prediction]) -> dict[tuple[str, str, str], Prediction]:
    """Return predictions by what makes a prompt the same prompt."""
    return {prediction.key: prediction for prediction in predictions}
