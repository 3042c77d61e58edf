"""A prediction: one test prompt, what the base and the adapted model answered, and how good that was.

    predictions = read_predictions(Path("metrics/predictions.jsonl"))

`evaluate` writes them; the metrics, their intervals, the report and `lab review` are made of them alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.core.files import read_jsonl

MODELS = {"adapter": "", "base": "_base"}  # what each model's metrics end in


@dataclass(frozen=True)
class Scores:
    """How good one answer is. Sums over prompts of these make the metrics."""

    exact_match: int | None  # None where the prompt has no exact answer
    rouge_l: float  # 0 to 1
    chrf: float  # 0 to 100
    negative_log_likelihood: float  # of the whole reference answer, in nats
    tokens: int  # of the reference answer
    ended: int  # 1 where the answer ended by itself
    repetition_rate: float  # 0 to 1


@dataclass(frozen=True)
class Parity:
    """Whether PyTorch would have given the adapted model's answer; if not, where it would have left it."""

    identical: bool
    token: int | None = None  # the first that differs, from 0
    logit_gap: float | None = None  # by how much PyTorch preferred its own


@dataclass(frozen=True)
class Prediction:
    """One test prompt with both models' answers."""

    kind: str  # recall or transfer, or test
    question: str
    reference: str
    base: str
    adapter: str
    parity: Parity
    scores: dict[str, Scores]  # by the name in MODELS
    exact_answer: str | None = None  # the part of the reference that must come, word for word

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it the same prompt in two revisions."""
        return self.kind, self.question, self.reference

    @classmethod
    def of(cls, values: dict[str, Any]) -> Prediction:
        """Return the prediction of a JSON object, whatever else it holds: other releases wrote other keys.

        Raises TypeError or KeyError where something is missing.
        """
        texts = {
            name: values[name] for name in ("kind", "question", "reference", "base", "adapter")
        }
        scores = {name: Scores(**values["scores"][name]) for name in MODELS}
        parity = Parity(**values["parity"])
        return cls(**texts, parity=parity, scores=scores, exact_answer=values.get("exact_answer"))

    def as_json(self) -> str:
        """Return the prediction as one line of JSON."""
        values = asdict(self)
        if self.parity.identical:
            values["parity"] = {"identical": True}
        return json.dumps(values, ensure_ascii=False)


def read_predictions(path: Path) -> list[Prediction]:
    """Read a file that `evaluate` or `report` wrote."""
    return [Prediction.of(values) for values in read_jsonl(path)]


def as_jsonl(predictions: Iterable[Prediction]) -> str:
    """Return predictions as JSON Lines."""
    return "".join(prediction.as_json() + "\n" for prediction in predictions)
