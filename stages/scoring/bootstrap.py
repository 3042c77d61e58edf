"""How sure a figure is: a bootstrap over the test prompts (Efron 1979), Wilson's formula for their shares.

Prompts are resampled with replacement, within each kind; the wordings of one fact are drawn together, since
a model that knows the fact answers them all. It says what other prompts could have changed, not what
another training seed could (`lab noise`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np

from stages.scoring.metrics import Terms, finish, parity_terms, terms_of
from stages.scoring.predictions import Prediction
from stages.scoring.proportions import LEVEL, Interval, is_share, share

DRAWS = 4000
SEED = 0


def intervals(predictions: list[Prediction]) -> dict[str, Interval]:
    """Return the 95 % interval of every metric that is made of prompts."""
    drawn = draw(predictions, np.random.default_rng(SEED))
    found = {name: middle(values) for name, values in drawn.items()}
    facts, _ = facts_of(predictions)
    for name, (right, asked) in all_terms(predictions).items():
        if is_share(name):
            found[name] = share(right[asked > 0], facts[asked > 0])
    return found


def all_terms(predictions: list[Prediction]) -> Terms:
    """Return the terms of every metric that is made of prompts."""
    return terms_of(predictions) | parity_terms(predictions)


def middle(values: np.ndarray) -> Interval:
    """Return the interval that holds the middle 95 % of drawn values, [draws]."""
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def draw(predictions: list[Prediction], random: np.random.Generator) -> dict[str, np.ndarray]:
    """Return every metric, [draws] each, over resampled prompts."""
    facts, kinds = facts_of(predictions)
    # a draw is a count for each fact, so all draws of a metric are two products of matrices
    times = how_often(kinds, random)
    drawn = {}
    for name, (above, below) in all_terms(predictions).items():
        over, under = (times @ np.bincount(facts, column, len(kinds)) for column in (above, below))
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn[name] = finish(name, np.where(under > 0, over / under, 0.0))
    return drawn


def facts_of(predictions: list[Prediction]) -> tuple[np.ndarray, list[str]]:
    """Return, [prompts], which fact each prompt asks for, and, [facts], the kind of each fact."""
    numbers = number((each.kind, each.reference) for each in predictions)
    kinds = dict(zip(numbers, (each.kind for each in predictions), strict=True))
    return np.array(numbers), [kinds[fact] for fact in range(len(kinds))]


def number(keys: Iterable[Hashable]) -> list[int]:
    """Number keys in the order in which they first come."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def how_often(kinds: list[str], random: np.random.Generator) -> np.ndarray:
    """Return, [draws, facts], how often each fact is drawn; every kind keeps its number of facts."""
    times = np.zeros((DRAWS, len(kinds)))
    for kind in sorted(set(kinds)):  # within each kind: recall's uncertainty is not transfer's
        members = [index for index, other in enumerate(kinds) if other == kind]
        share = np.full(len(members), 1 / len(members))
        times[:, members] = random.multinomial(len(members), share, size=DRAWS)
    return times
