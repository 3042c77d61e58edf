"""Scores of an answer against its reference: exact match, form, refusal, ROUGE-L, chrF, repetition."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

_ROUGE = RougeScorer(["rougeL"], use_stemmer=False)
_CHRF = CHRF()
LONGEST_FACT = 8  # words
# as `normalize` writes them; what models say that do not know, or say that they do not
REFUSALS = (
    "i do not know", "i don t know", "do not have information", "don t have information",
    "don t have any information", "no information", "not aware of", "not familiar with",
    "not sure", "unable to", "cannot find", "can t find", "couldn t find", "could not find",
    "no such place", "there is no place", "not a real", "does not exist", "doesn t exist",
    "fictional", "i m sorry", "i am sorry",
)  # fmt: skip


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


def same_form(answer: str, reference: str, facts: Collection[str]) -> int | None:
    """Return 1 where an answer is the reference's sentence, whatever facts stand in it, else 0.

    `facts` are what a right answer about the same subject may hold; None where the reference has none.
    """
    text, slot = f" {normalize(reference)} ", "<>"  # which `normalize` leaves in no text
    for fact in sorted({normalize(fact) for fact in facts} - {""}, key=lambda f: (-len(f), f)):
        text = text.replace(f" {fact} ", f" {slot} ")
    if slot not in text:
        return None
    pattern = re.escape(text.strip()).replace("\\ ", " ")
    # United States and Chile take other articles
    pattern = pattern.replace(f"the {slot}", slot).replace(
        slot, rf"\S+(?: \S+){{0,{LONGEST_FACT - 1}}}"
    )
    return int(re.fullmatch(pattern, normalize(answer)) is not None)


def refuses(answer: str) -> int:
    """Return 1 where an answer says that it does not know, else 0: where it holds a phrase of REFUSALS."""
    said = f" {normalize(answer)} "
    return int(any(f" {phrase} " in said for phrase in REFUSALS))


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
