"""From the scores of single prompts to the metrics of metrics/quality.json.

    terms = terms_of(predictions)               # metric -> what each prompt adds above and below the line
    value = ratio("chrf", *terms["chrf"])       # the metric over all prompts, rounded

Every metric is a ratio of two sums over prompts, so that a bootstrap can draw prompts again and get the
metric that `evaluate` would have written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from stages.scoring.predictions import MODELS, Prediction, Scores

Terms = dict[str, tuple[np.ndarray, np.ndarray]]
Term = Callable[[Scores], float | None]

DIGITS = {"chrf": 2, "answer_perplexity": 3}


def terms_of(predictions: list[Prediction]) -> Terms:
    """Return numerators and denominators, [prompts] each, of every metric that the scores give."""
    # metric -> what a prompt adds to its numerator and to its denominator
    sums: dict[str, tuple[Term, Term]] = {
        "rouge_l": (lambda scores: scores.rouge_l, one),
        "chrf": (lambda scores: scores.chrf, one),
        "answer_perplexity": (lambda scores: scores.negative_log_likelihood, lambda s: s.tokens),
        "ended_share": (lambda scores: scores.ended, one),
        "repetition_rate": (lambda scores: scores.repetition_rate, one),
    }
    kinds = sorted({prediction.kind for prediction in predictions})
    terms: Terms = {}
    for model, suffix in MODELS.items():
        scores = [prediction.scores[model] for prediction in predictions]
        for kind in kinds:
            # a prompt of another kind, or without an exact answer, counts on neither side of the line
            exact = [
                each.scores[model].exact_match if each.kind == kind else None
                for each in predictions
            ]
            terms[f"{kind}_exact_match{suffix}"] = (
                column(value or 0.0 for value in exact),
                column(value is not None for value in exact),
            )
        for name, (above, below) in sums.items():
            terms[name + suffix] = (column(map(above, scores)), column(map(below, scores)))
    return terms


def one(_: Scores) -> float:
    """Count every prompt once."""
    return 1.0


def column(values: Iterable[float | None]) -> np.ndarray:
    """Return one number per prompt."""
    return np.array(list(values), dtype=np.float64)


def parity_terms(predictions: list[Prediction]) -> Terms:
    """Return the terms of the share of answers that PyTorch would have given too."""
    identical = column(prediction.parity.identical for prediction in predictions)
    return {"identical_answers": (identical, np.ones(len(predictions)))}


def ratio(name: str, above: np.ndarray, below: np.ndarray) -> float:
    """Return a metric from its terms, rounded; 0 of nothing."""
    value = above.sum() / below.sum() if below.sum() else 0.0
    plain = name.removesuffix(MODELS["base"])
    return round(float(finish(plain, value)), DIGITS.get(plain, 4))


def finish(name: str, value: Any) -> Any:
    """Turn a mean, or an array of them, into the metric: a perplexity is the exponential of one."""
    return np.exp(value) if name.startswith("answer_perplexity") else value


def summarize(predictions: list[Prediction]) -> dict[str, float]:
    """Return the flat quality metrics; those of the model without adapter end in _base."""
    return {name: ratio(name, *both) for name, both in terms_of(predictions).items()}
