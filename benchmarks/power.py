"""How large a change of a share the test prompts can detect, and how many prompts a change of 0.05 needs.

    python -m benchmarks.power          # no model, seconds; writes benchmarks/results/power.json

Simulates two revisions that are asked the same prompts and counts how often `lab review` would call the
change beyond the prompts (lab/review/intervals.py, each prompt a fact of its own). Answers are alike in both
but for those that the change turns right, and CHURN of them, half of which go either way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.machine import keep
from lab.review.intervals import paired_change

POWER = 0.8
REPEATS = 4000
CHURN = 0.1  # of the prompts
PROMPTS = {"recall_exact_match": 44, "transfer_exact_match": 45}
WANTED = 0.05


def main() -> None:
    """Find what each number of prompts detects, and the prompts that the wanted change needs."""
    detected = {name: smallest_change(count) for name, count in PROMPTS.items()}
    figures: dict[str, Any] = {
        "power": POWER, "churn": CHURN, "repeats": REPEATS, "prompts": PROMPTS,
        "smallest_change": detected,
        "by_chance": {name: round(power(0.0, count), 4) for name, count in PROMPTS.items()},
        "change": WANTED, "prompts_for_change": prompts_for(WANTED),
    }  # fmt: skip
    keep("power", figures)
    print(figures)


def power(change: float, count: int) -> float:
    """Return how often a true change is found, its sign included; of no change, how often one is."""
    random = np.random.default_rng(count)
    gained, lost, _ = random.multinomial(
        count, [change + CHURN / 2, CHURN / 2, 1 - change - CHURN], size=REPEATS
    ).T
    pairs, places = np.unique(np.stack([gained, lost]), axis=1, return_inverse=True)
    sure = [sides(float(up), float(down), count, change) for up, down in pairs.T]
    return float(np.array(sure)[places.ravel()].mean())


def sides(gained: float, lost: float, count: int, change: float) -> bool:
    """Say whether the interval of a change leaves 0 out: on the right side, where there is one."""
    low, high = paired_change(gained, lost, count)
    return low > 0 or (change == 0 and high < 0)


def smallest_change(count: int) -> float:
    """Return the smallest change, in steps of 0.01, that so many prompts find with the power asked for."""
    steps = (step / 100 for step in range(1, 90))
    return next(change for change in steps if power(change, count) >= POWER)


def prompts_for(change: float) -> int:
    """Return how many prompts a change needs, in steps of 10."""
    count = 10
    while power(change, count) < POWER:
        count += 10
    return count


if __name__ == "__main__":
    main()
