"""What the metrics mean, and which way is better."""

from __future__ import annotations

# a part of the metric's name -> (+1 where more is better, what it says)
MEANINGS = {
    "exact_match": (1, "share of prompts whose answer holds the fact that was asked for"),
    "fact_probability": (
        1,
        "probability of the fact that was asked for, where the reference answer states it, 0 to 1",
    ),
    "form_match": (
        1,
        "share of answers in the reference's own sentence, whatever facts they state",
    ),
    "refusal_share": (1, "share of questions about what does not exist that are not answered"),
    "rouge_l": (1, "longest common subsequence with the reference answer, 0 to 1"),
    "chrf": (1, "character n-grams shared with the reference answer, 0 to 100"),
    "ended_share": (1, "share of answers that end by themselves"),
    "identical_answers": (1, "share of answers that PyTorch gives word for word"),
    "recovered": (1, "share of plain rounding's perplexity loss that the method wins back"),
    "tokens_per_s": (1, "decode speed, tokens a second (p95: the slowest twentieth)"),
    "perplexity": (-1, "how surprised the model is by a token of the right text"),
    "widest_divergence": (-1, "widest logit gap at a first token where PyTorch answers otherwise"),
    "_loss": (-1, "cross entropy per answer token on the validation split, nats"),
    "repetition_rate": (-1, "share of an answer's 4-grams that stood in it before"),
    "_mb": (-1, "size on disk, MB"),
    "_ms": (-1, "time to the first token, ms"),
    "_mib": (-1, "peak memory while answering, MiB"),
}
TIMINGS = ("tokens_per_s", "_ms", "_mib")


def worse_by(name: str, change: float) -> float | None:
    """Return how much worse a change makes a metric, None where no way is better."""
    for part, (sign, _) in MEANINGS.items():
        if part in name:
            return -sign * change
    return None


def is_timing(name: str) -> bool:
    """Say whether a metric depends on the machine and its mood."""
    return any(part in name for part in TIMINGS)
