"""The estimate of the mean length under censoring, against the truth it estimates and against closed forms."""

from __future__ import annotations

import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtail.engine.carry_stats import mean_length


@given(st.lists(st.integers(1, 50), min_size=1))
def test_without_unfinished_trajectories_it_is_the_mean(lengths: list[int]) -> None:
    assert mean_length(lengths, [True] * len(lengths)) == pytest.approx(fmean(lengths))


def test_a_hand_computed_case() -> None:
    # Ended at 2 and 6, unfinished at 3: S = 2/3 from 2 on, nobody else to decide until 6.
    assert mean_length([2, 3, 6], [True, False, True]) == pytest.approx(2 + 4 * (2 / 3))


def test_nothing_finished_has_no_estimate() -> None:
    assert mean_length([4, 5], [False, False]) is None
    assert mean_length([], []) is None


def test_it_finds_the_mean_that_plain_averages_miss() -> None:
    """Geometric lengths (mean 50), cut at random: the estimate is right where both plain means are far too low.

    2,000 seeded draws; the standard error of the estimate is about 2.
    """
    rng = random.Random(0)
    lengths = [1 + int(rng.expovariate(1 / 50)) for _ in range(2000)]
    cuts = [1 + int(rng.expovariate(1 / 60)) for _ in lengths]
    seen = [min(length, cut) for length, cut in zip(lengths, cuts, strict=True)]
    is_finished = [length <= cut for length, cut in zip(lengths, cuts, strict=True)]
    estimate = mean_length(seen, is_finished)
    assert estimate == pytest.approx(fmean(lengths), rel=0.12)
    assert fmean(seen) < 0.7 * fmean(lengths)
    assert fmean(n for n, done in zip(seen, is_finished, strict=True) if done) < 0.7 * fmean(lengths)
