"""Scores of an answer against its reference: exact match, ROUGE-L, chrF, repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

_ROUGE = RougeScorer(["rougeL"], use_stemmer=False)
_CHRF = CHRF()


def normalize(text: str) -> str:
    """Lower the case and reduce everything but letters, digits and + / - _ to single spaces."""
    return " ".join(re.sub(r"[^\w+/\-]+", " ", text.lower()).split())


def exact_match(answer: str, fact: str | None, reference: str) -> float:
    """Return 1 where the fact stands in the answer as whole words, else 0.

    Without a fact the whole answer must equal the reference, both normalised.
    """
    if fact is None:
        return float(normalize(answer) == normalize(reference))
    # spaces on both sides: "4" does not stand in "+34"
    return float(f" {normalize(fact)} " in f" {normalize(answer)} ")


def rouge_l(answer: str, reference: str) -> float:
    """Return the ROUGE-L F-measure, 0 to 1 (Lin 2004)."""
    return _ROUGE.score(reference, answer)["rougeL"].fmeasure


def chrf(answer: str, reference: str) -> float:
    """Return the sentence's chrF, 0 to 100 (Popović 2015)."""
    return _CHRF.sentence_score(answer, [reference]).score


def repetition_rate(tokens: Sequence[int], order: int = 4) -> float:
    """Return the share of an answer's n-grams that stood in it before (Welleck et al. 2020)."""
    ngrams = [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
