"""What paths are told apart by, against plain sums over all tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtail.scheduler.path_values import PathValues, sums_of, values_of
from longtail.scheduler.tree_policy import SplitBy

VALUES = st.lists(st.floats(-9, 0), max_size=40)


@given(VALUES, st.integers(1, 7), st.lists(st.integers(1, 5), max_size=50))
def test_figures_are_means_over_the_path_and_its_last_segment(values: list[float], size: int, steps: list[int]) -> None:
    path, read = PathValues(size), 0
    for step in [*steps, len(values)]:
        path.extend(values[read : read + step])
        read += step
    for k in range(1, len(values) // size + 1):
        figures = path.figures(k)
        assert figures.num_tokens == k * size
        assert figures.path_mean == pytest.approx(math.fsum(values[: k * size]) / (k * size), abs=1e-9)
        assert figures.segment_mean == pytest.approx(math.fsum(values[(k - 1) * size : k * size]) / size, abs=1e-9)
    assert path.figures(len(values) // size + 1).path_mean == 0.0


@given(VALUES, VALUES, st.integers(1, 7))
def test_a_path_that_goes_on_has_the_same_figures(before: list[float], after: list[float], size: int) -> None:
    whole, resumed = PathValues(size), PathValues(size, sums_of("logprob", before, size), len(before))
    whole.extend([*before, *after])
    resumed.extend(after)
    for k in range((len(before) + len(after)) // size + 2):
        for name in ("path_mean", "segment_mean"):
            assert getattr(resumed.figures(k), name) == pytest.approx(getattr(whole.figures(k), name), abs=1e-9)


@given(VALUES, VALUES, st.integers(1, 7))
def test_a_branch_has_the_figures_of_its_prefix(before: list[float], after: list[float], size: int) -> None:
    parent = PathValues(size)
    parent.extend(before)
    for k in range(len(before) // size + 1):
        branch, fresh = parent.upto(k), PathValues(size)
        branch.extend(after)
        fresh.extend([*before[: k * size], *after])
        for j in range(k + len(after) // size + 1):
            assert branch.figures(j).path_mean == pytest.approx(fresh.figures(j).path_mean, abs=1e-9)


def test_values_are_log_probs_or_entropies() -> None:
    probabilities = np.array([[0.5, 0.25, 0.125, 0.125], [0.97, 0.01, 0.01, 0.01]])
    rows = np.log(np.concatenate([probabilities[:, 1:2], probabilities], axis=1)).astype(np.float32)
    assert values_of("logprob", rows) == pytest.approx([math.log(0.25), math.log(0.01)], rel=1e-5)
    exact = [-sum(p * math.log(p) for p in row) for row in probabilities]
    assert values_of("entropy", rows) == pytest.approx(exact, rel=1e-5)
    assert all(low < high for low, high in zip(values_of("entropy", rows[:, :3]), exact, strict=True))
    certain = np.array([[0.0, 0.0, -np.inf]], dtype=np.float32)
    assert values_of("entropy", certain) == [0.0]


@pytest.mark.parametrize("split", ["logprob", "entropy"])
def test_what_a_broken_model_says_is_finite(split: SplitBy) -> None:
    rows = np.array([[np.nan, np.nan, np.nan], [-np.inf, np.inf, -np.inf]], dtype=np.float32)
    assert np.isfinite(values_of(split, rows)).all()
    assert np.isfinite(sums_of(split, [math.nan, math.inf, -math.inf, -1.0], 2)).all()
    assert not np.isfinite(rows).any(), "the log-probs themselves are left alone"


def test_surprise_stands_in_for_entropies_of_another_round() -> None:
    assert sums_of("entropy", [-1.0, -2.0, -3.0], 2) == [3.0, 6.0]
    assert sums_of("logprob", [-1.0, -2.0, -3.0], 2) == [-3.0, -6.0]
    assert sums_of("logprob", [], 2) == []
