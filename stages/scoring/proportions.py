"""How sure a share of prompts is: intervals that hold for 44 of 44, and for wordings of one fact.

    wilson(44, 44)                    # 0.92 to 1: all right is no certainty
    share(right, facts)               # the same, where several prompts ask for one fact

A bootstrap has no interval to give where all prompts went alike, since all draws are alike then.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]

LEVEL = 95  # percent
Z = NormalDist().inv_cdf(0.5 + LEVEL / 200)
# what the names of metrics end in that are shares of prompts, each of them right or wrong
SHARES = ("exact_match", "form_match", "refusal_share", "ended_share", "identical_answers")


def is_share(name: str) -> bool:
    """Say whether a metric is a share of prompts."""
    return name.removesuffix("_base").endswith(SHARES)


def wilson(right: float, count: float) -> Interval:
    """Return the score interval of a proportion (Wilson 1927, JASA 22:209; method 3 of Newcombe 1998).

    Counts may be fractions: those of an effective number of prompts. Of none, everything is possible.
    """
    if count == 0:
        return 0.0, 1.0
    middle = (right + Z**2 / 2) / (count + Z**2)
    half = Z / (count + Z**2) * np.sqrt(right * (count - right) / count + Z**2 / 4)
    low = 0.0 if right == 0 else max(0.0, float(middle - half))
    return low, 1.0 if right == count else min(1.0, float(middle + half))


def share(right: np.ndarray, facts: np.ndarray) -> Interval:
    """Return the interval of the mean of 0 and 1, [prompts], where prompts of one fact are alike.

    Wilson's, of as many independent prompts as tell as much (Korn and Graubard 1998, Survey
    Methodology 24:193): their number over the design effect.
    """
    weight = 1 / design_effect(right, facts)
    return wilson(float(right.sum() * weight), float(len(right) * weight))


def design_effect(values: np.ndarray, facts: np.ndarray) -> float:
    """Return by how much prompts of one fact widen the variance of a mean (Kish 1965), at least 1.

    Where all values are alike, or few facts could tell by chance more than is possible, it is that of
    prompts which always go as the others of their fact.
    """
    if len(values) == 0:
        return 1.0
    _, places, sizes = np.unique(facts, return_inverse=True, return_counts=True)
    most = float((sizes**2).sum() / len(values))
    spread = values.var()
    if spread == 0 or len(sizes) < 2:
        return most
    sums = np.bincount(places, values - values.mean())  # of a fact's prompts
    found = (sums**2).sum() * len(sizes) / (len(sizes) - 1) / (len(values) * spread)
    return float(np.clip(found, 1.0, most))
