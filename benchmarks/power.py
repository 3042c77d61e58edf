"""How large a change the test prompts can detect, and how many prompts a change of 0.05 needs.

    python -m benchmarks.power          # no model, seconds; writes benchmarks/results/power.json

Simulates two revisions that are asked the same prompts and counts how often `lab review` would call the
change beyond the prompts (lab/review/intervals.py, each prompt a fact of its own).

exact match   answers are alike in both but for those that the change turns right, and for a churn, half of
              which goes either way: CHURN, and what two real adapters have (benchmarks/results/pairs.json)
probability   of the fact: prompts are drawn from the real pairs, whose mean change is taken off and the
              change looked for put on
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.machine import RESULTS, keep
from lab.review.intervals import paired_change
from stages.core.files import read_json
from stages.scoring.proportions import LEVEL

POWER = 0.8
REPEATS = 4000
CHURN = 0.1  # of the prompts
BEFORE = {"recall_exact_match": 44, "transfer_exact_match": 45}  # what evaluate asked up to 0.2
KINDS = ("recall", "transfer")
WANTED = 0.05
DRAWS, SAMPLES = 400, 500  # of a bootstrap; of simulated revisions


def main() -> None:
    """Find what each number of prompts detects, and the prompts that the wanted change needs."""
    pairs = {kind: np.array(read_json(RESULTS / "pairs.json")[kind]) for kind in KINDS}
    asked = {f"{kind}_exact_match": len(pairs[kind]) for kind in KINDS}
    churn = {f"{kind}_exact_match": real_churn(pairs[kind]) for kind in KINDS}
    figures: dict[str, Any] = {
        "power": POWER, "churn": CHURN, "repeats": REPEATS,
        "prompts_before": BEFORE, "prompts": asked,
        "smallest_change_before": {n: smallest_change(count) for n, count in BEFORE.items()},
        "smallest_change": {n: smallest_change(count) for n, count in asked.items()},
        "by_chance": {n: round(power(0.0, count), 4) for n, count in asked.items()},
        "change": WANTED, "prompts_for_change": prompts_for(WANTED),
        "real_churn": churn,
        "smallest_change_real": {n: smallest_change(c, churn[n]) for n, c in asked.items()},
    }  # fmt: skip
    figures["probability"] = {
        kind: probability(pairs[kind], BEFORE[f"{kind}_exact_match"]) for kind in KINDS
    }
    keep("power", figures)
    print(figures)


def real_churn(pairs: np.ndarray) -> float:
    """Return the share of prompts of which one adapter knows the fact and the other not, but for the change.

    Of the prompts that differ, as many went the other way as would have without any change.
    """
    moved = pairs[:, 2] - pairs[:, 0]
    return round(2 * float(min((moved > 0).mean(), (moved < 0).mean())), 4)


def power(change: float, count: int, churn: float = CHURN) -> float:
    """Return how often a true change is found, its sign included; of no change, how often one is."""
    random = np.random.default_rng(count)
    gained, lost, _ = random.multinomial(
        count, [change + churn / 2, churn / 2, 1 - change - churn], size=REPEATS
    ).T
    pairs, places = np.unique(np.stack([gained, lost]), axis=1, return_inverse=True)
    sure = [sides(float(up), float(down), count, change) for up, down in pairs.T]
    return float(np.array(sure)[places.ravel()].mean())


def sides(gained: float, lost: float, count: int, change: float) -> bool:
    """Say whether the interval of a change leaves 0 out: on the right side, where there is one."""
    low, high = paired_change(gained, lost, count)
    return low > 0 or (change == 0 and high < 0)


def smallest_change(count: int, churn: float = CHURN) -> float:
    """Return the smallest change, in steps of 0.005, that so many prompts find with the power asked for."""
    steps = (step / 200 for step in range(1, 180))
    return next(change for change in steps if power(change, count, churn) >= POWER)


def prompts_for(change: float) -> int:
    """Return how many prompts a change needs, in steps of 10."""
    count = 10
    while power(change, count) < POWER:
        count += 10
    return count


def probability(pairs: np.ndarray, before: int) -> dict[str, float]:
    """Return what the probability of the fact detects: with the prompts of before, and with all."""
    moved = pairs[:, 3] - pairs[:, 1]
    centred = moved - moved.mean()
    needed = 10
    while detected(centred, needed) > WANTED:
        needed += 10
    return {
        "smallest_change_before": round(detected(centred, before), 4),
        "smallest_change": round(detected(centred, len(moved)), 4),
        "prompts_for_change": needed,
    }


def detected(centred: np.ndarray, count: int) -> float:
    """Return the change that is found with the power asked for: it moves every interval by itself."""
    random = np.random.default_rng(count)
    tail = (100 - LEVEL) / 2
    lows = []
    for _ in range(SAMPLES):
        drawn = random.choice(centred, count)
        times = random.multinomial(count, np.full(count, 1 / count), size=DRAWS)
        lows.append(np.percentile(times @ drawn / count, tail))
    return float(np.quantile(-np.array(lows), POWER))


if __name__ == "__main__":
    main()
