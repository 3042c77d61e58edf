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
# kinds of prompts that are asked beside the split, for what they alone tell
CONTROL, UNKNOWN = "control", "unknown"


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
    # p of the exact answer's tokens where the reference has them, 0 to 1; None as with exact_match
    fact_probability: float | None = None
    form_match: int | None = (
        None  # 1 where it is the reference's sentence, whatever facts it states
    )
    refusal: int | None = (
        None  # 1 where it says that it does not know; of prompts that ask for the unknown
    )


@dataclass(frozen=True)
class Parity:
    """Whether PyTorch would have given the adapted model's answer; if not, where it would have left it."""

    identical: bool
    token: int | None = None  # the first that differs, from 0
    logit_gap: float | None = None  # by how much PyTorch preferred its own


@dataclass(frozen=True)
class Prediction:
    """One test prompt with both models' answers, or the adapter's alone."""

    kind: str  # recall or transfer, or test; control or unknown
    question: str
    reference: str
    base: str | None  # None where the base was not asked
    adapter: str
    parity: Parity | None  # None where PyTorch was not asked
    scores: dict[str, Scores]  # by the name in MODELS, of those that were asked
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
        texts = {name: values[name] for name in ("kind", "question", "reference", "adapter")}
        texts["base"] = values.get("base")
        models = [name for name in MODELS if name == "adapter" or name in values["scores"]]
        scores = {name: Scores(**values["scores"][name]) for name in models}
        read = values.get("parity")
        parity = Parity(**read) if read else None
        return cls(**texts, parity=parity, scores=scores, exact_answer=values.get("exact_answer"))

    def as_json(self) -> str:
        """Return the prediction as one line of JSON."""
        values = asdict(self)
        if self.base is None:
            del values["base"]
        if self.parity is None:
            del values["parity"]
        elif self.parity.identical:
            values["parity"] = {"identical": True}
        return json.dumps(values, ensure_ascii=False)


def read_predictions(path: Path) -> list[Prediction]:
    """Read a file that `evaluate` or `report` wrote."""
    return [Prediction.of(values) for values in read_jsonl(path)]


def as_jsonl(predictions: Iterable[Prediction]) -> str:
    """Return predictions as JSON Lines."""
    return "".join(prediction.as_json() + "\n" for prediction in predictions)
