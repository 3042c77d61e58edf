"""From the scores of single prompts to the metrics of metrics/quality.json.

    terms = terms_of(rows)                      # metric -> what each prompt adds above and below the line
    value = ratio("chrf", *terms["chrf"])       # the metric over all prompts, rounded

Every metric is a ratio of two sums over prompts, so that `lab review` can draw prompts again (bootstrap)
and get the metric that `evaluate` would have written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Row = dict[str, Any]
Terms = dict[str, tuple[np.ndarray, np.ndarray]]

DIGITS = {"chrf": 2, "answer_perplexity": 3}
MODELS = {"adapter": "", "base": "_base"}  # what each model's metrics end in


def terms_of(rows: list[Row]) -> Terms:
    """Return numerators and denominators, [prompts] each, of every metric that `scores` gives."""
    kinds = sorted({row["kind"] for row in rows})
    return {
        name + suffix: (column(rows, above), column(rows, below))
        for model, suffix in MODELS.items()
        for name, above, below in _metrics(kinds, model)
    }


def _metrics(kinds: list[str], model: str) -> Iterator[tuple[str, Callable, Callable]]:
    """Name the metrics of one model, with what a row adds to each sum."""

    def score(name: str) -> Callable[[Row], float]:
        return lambda row: row["scores"][model][name]

    def matches(kind: str) -> Callable[[Row], float]:
        return lambda row: (row["kind"] == kind and row["scores"][model]["exact_match"]) or 0.0

    def counts(kind: str) -> Callable[[Row], float]:
        return lambda row: row["kind"] == kind and row["scores"][model]["exact_match"] is not None

    for kind in kinds:
        yield f"{kind}_exact_match", matches(kind), counts(kind)
    yield "rouge_l", score("rouge_l"), one
    yield "chrf", score("chrf"), one
    yield "answer_perplexity", score("negative_log_likelihood"), score("tokens")
    yield "ended_share", score("ended"), one
    yield "repetition_rate", score("repetition_rate"), one


def one(_: Row) -> float:
    """Count every prompt once."""
    return 1.0


def column(rows: list[Row], value: Callable[[Row], float]) -> np.ndarray:
    """Return one number per prompt."""
    return np.array([value(row) for row in rows], dtype=np.float64)


def parity_terms(rows: list[Row]) -> Terms:
    """Return the terms of the share that `stages.answers.parity` measures."""
    identical = column(rows, lambda row: row["parity"]["identical"])
    return {"identical_answers": (identical, np.ones(len(rows)))}


def ratio(name: str, above: np.ndarray, below: np.ndarray) -> float:
    """Return a metric from its terms, rounded; 0 of nothing."""
    value = above.sum() / below.sum() if below.sum() else 0.0
    plain = name.removesuffix(MODELS["base"])
    return round(float(finish(plain, value)), DIGITS.get(plain, 4))


def finish(name: str, value):
    """Turn a mean, or an array of them, into the metric: a perplexity is the exponential of one."""
    return np.exp(value) if name.startswith("answer_perplexity") else value


def summarize(rows: list[Row]) -> dict[str, float]:
    """Return the flat quality metrics; those of the model without adapter end in _base."""
    return {name: ratio(name, *both) for name, both in terms_of(rows).items()}
