"""Intervals of shares: published values, 44 of 44, wordings of one fact, and pairs of which none differs."""

import numpy as np
import pytest

from benchmarks.power import power
from lab.review.intervals import paired_change, unpaired_change
from stages.scoring.proportions import design_effect, share, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_the_published_one(right, count, low, high):
    assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)


def test_44_of_44_is_not_certain_and_of_none_everything_is_possible():
    assert wilson(44, 44) == pytest.approx((0.9197, 1.0), abs=5e-5)
    assert wilson(0, 0) == (0, 1)


def test_the_change_over_pairs_is_the_published_one():
    """Bonett's own example of `ci.prop.ps` in the R package statpsych: counts 12, 4, 26, 6."""
    assert paired_change(26, 4, 48) == pytest.approx((0.2548067, 0.6251933), abs=5e-6)


def test_the_change_between_two_samples_is_the_published_one():
    """Newcombe 1998, Statistics in Medicine 17:873, table II, method 10: 56 of 70 less 48 of 80."""
    found = unpaired_change(48 / 80, wilson(48, 80), 56 / 70, wilson(56, 70))
    assert found == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_a_change_that_is_there_is_found_and_one_that_is_not_seldom_claimed():
    assert power(0.5, 44) > 0.99
    assert 0 < power(0.0, 200) < 0.05
    assert power(0.1, 200) < power(0.1, 400)


def test_where_no_pair_differs_a_change_is_still_possible():
    low, high = paired_change(0, 0, 44)
    assert -0.07 < low < -0.05
    assert high == -low


def test_no_interval_leaves_what_is_possible():
    assert paired_change(44, 0, 44)[1] <= 1
    assert paired_change(0, 1, 1)[0] >= -1


def test_two_wordings_of_every_fact_count_as_one_prompt_where_they_go_alike():
    facts = np.repeat(np.arange(20), 2)
    right = np.repeat([1.0] * 10 + [0.0] * 10, 2)
    assert design_effect(right, facts) == 2
    assert share(right, facts) == wilson(10, 20)
    assert share(np.ones(40), facts) == wilson(20, 20)


def test_wordings_that_go_each_their_own_way_count_in_full():
    facts = np.repeat(np.arange(20), 2)
    assert share(np.tile([1.0, 0.0], 20), facts) == wilson(20, 40)
