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

from stages.scoring.predictions import CONTROL, MODELS, UNKNOWN, Prediction, Scores

Terms = dict[str, tuple[np.ndarray, np.ndarray]]
Term = Callable[[Scores], float | None]

DIGITS = {"chrf": 2, "answer_perplexity": 3}


def terms_of(predictions: list[Prediction]) -> Terms:
    """Return numerators and denominators, [prompts] each, of every metric that the scores give.

    A metric of one kind of prompts counts the others on neither side of the line, nor those without a value.
    What a kind has no value for at all is no metric of it.
    """
    # of the prompts of the split: what a prompt adds to a metric's numerator and to its denominator
    sums: dict[str, tuple[Term, Term]] = {
        "rouge_l": (lambda scores: scores.rouge_l, one),
        "chrf": (lambda scores: scores.chrf, one),
        "answer_perplexity": (lambda scores: scores.negative_log_likelihood, lambda s: s.tokens),
        "ended_share": (lambda scores: scores.ended, one),
        "repetition_rate": (lambda scores: scores.repetition_rate, one),
    }
    # of each kind of prompts, by the score that it is the mean of
    by_kind: dict[str, Callable[[Scores], float | None]] = {
        "exact_match": lambda scores: scores.exact_match,
        "fact_probability": lambda scores: scores.fact_probability,
        "form_match": lambda scores: scores.form_match,
        "refusal_share": lambda scores: scores.refusal,
    }
    kinds = sorted({prediction.kind for prediction in predictions})
    of_split = column(each.kind not in (CONTROL, UNKNOWN) for each in predictions)
    terms: Terms = {}
    for model, suffix in MODELS.items():
        scores = [prediction.scores.get(model) for prediction in predictions]
        asked = column(each is not None for each in scores) * of_split
        for name, score in by_kind.items():
            for kind in kinds:
                values = [
                    score(mine) if mine is not None and each.kind == kind else None
                    for mine, each in zip(scores, predictions, strict=True)
                ]
                if any(value is not None for value in values):
                    terms[f"{kind}_{name}{suffix}"] = (
                        column(value or 0.0 for value in values),
                        column(value is not None for value in values),
                    )
        for name, (above, below) in sums.items():
            terms[name + suffix] = (
                column(above(each) if each else 0.0 for each in scores) * asked,
                column(below(each) if each else 0.0 for each in scores) * asked,
            )
    return terms


def one(_: Scores) -> float:
    """Count every prompt once."""
    return 1.0


def column(values: Iterable[float | None]) -> np.ndarray:
    """Return one number per prompt."""
    return np.array(list(values), dtype=np.float64)


def parity_terms(predictions: list[Prediction]) -> Terms:
    """Return the terms of the share of answers that PyTorch would have given too."""
    found = [prediction.parity for prediction in predictions]
    identical = column(parity is not None and parity.identical for parity in found)
    return {"identical_answers": (identical, column(parity is not None for parity in found))}


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
