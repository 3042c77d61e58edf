"""Made-up answers to test prompts, right or wrong as a test needs them."""

from __future__ import annotations

from collections.abc import Sequence

from stages.scoring.predictions import MODELS, Parity, Prediction, Scores


def predictions(right: Sequence[int], base: Sequence[int] | None = None) -> list[Prediction]:
    """Return test prompts, one fact each, answered rightly or not: by the adapter, and by the base."""
    return [
        Prediction(
            kind="recall",
            question=f"question {number}",
            reference=f"fact {number}",
            base="an answer",
            adapter="another",
            parity=Parity(identical=True),
            scores={
                model: Scores(match, 0.5, 50.0, 2.0, 4, 1, 0.0)
                for model, match in zip(MODELS, matches, strict=True)
            },
        )
        for number, matches in enumerate(zip(right, right if base is None else base, strict=True))
    ]
