"""Group filters, on any rewards; a group that lacks rewards is a failure."""

from __future__ import annotations

import inspect
import math
from concurrent.futures import Future
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longtail.engine.errors import InvalidInputError
from longtail.engine.hook_points import Verdict
from longtail.hooks import Accept, GroupFilter, HookError, MeanReward, Reject, RewardSpread

rewards = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8)
bounds = st.floats(allow_nan=False)


def answer(future: Future[Any]) -> Any:
    return future.result(20.0)


def accepts(hook: Any, group: Any) -> bool:
    verdict = hook.on_group(group)
    assert isinstance(verdict, Accept | Reject)
    assert isinstance(verdict, Reject) or verdict == Accept()
    return isinstance(verdict, Accept)


@given(rewards)
def test_without_a_minimum_a_group_passes_exactly_if_its_rewards_differ(group, values: list[float]) -> None:
    assert accepts(RewardSpread(), group(values)) == (len(set(values)) > 1)


@given(rewards, st.floats(min_value=0, allow_infinity=False))
def test_the_spread_has_to_exceed_the_minimum(group, values: list[float], minimum: float) -> None:
    assert accepts(RewardSpread(minimum), group(values)) == (max(values) - min(values) > minimum)


@given(rewards, st.floats(min_value=0, allow_infinity=False), st.randoms())
def test_the_spread_knows_no_order(group, values: list[float], minimum: float, random) -> None:
    shuffled = random.sample(values, len(values))
    assert accepts(RewardSpread(minimum), group(values)) == accepts(RewardSpread(minimum), group(shuffled))


@given(rewards, bounds, bounds)
@example([0.1] * 3, 0.1, 0.1)
@example([1.7e308, 1.7e308], 1e308, math.inf)
def test_the_mean_has_to_be_in_the_range(group, values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    mean = float(sum(map(Fraction, values)) / len(values))
    assert accepts(MeanReward(low, high), group(values)) == (low <= mean <= high)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 8))
def test_equal_rewards_have_that_mean_and_no_spread(group, value: float, size: int) -> None:
    assert accepts(MeanReward(value, value), group([value] * size))
    assert not accepts(RewardSpread(), group([value] * size))


def test_reasons_say_the_figure_and_the_bound(start, group) -> None:
    hooks = start(MeanReward(0.25, 0.75), RewardSpread(0.5))
    assert answer(hooks.finish_group(group([1.0, 1.0]))).rejected == (
        "hooks[0] (MeanReward): mean reward 1 is not in [0.25, 0.75]"
    )
    assert answer(hooks.finish_group(group([0.5, 1.0]))).rejected == (
        "hooks[1] (RewardSpread): rewards spread over 0.5, not more than 0.5"
    )
    assert answer(hooks.finish_group(group([0.0, 1.0]))) == Verdict(group=group([0.0, 1.0]))


@pytest.mark.parametrize("make", [RewardSpread, lambda **options: MeanReward(-math.inf, math.inf, **options)])
@pytest.mark.parametrize("values", [[None, 1.0], [1.0, None], [None], [], [0.0, math.nan], [0.0, math.inf]])
def test_a_group_that_lacks_rewards_is_a_failure(start, group, make, values) -> None:
    verdict = answer(start(make()).finish_group(group(values)))
    assert "raised InvalidInputError: " in verdict.rejected
    assert ("reward: expected a finite number" if values else "at least one") in verdict.rejected
    with pytest.raises(HookError):
        answer(start(make(on_failure="raise")).finish_group(group(values)))
    assert answer(start(make(on_failure="ignore")).finish_group(group(values))).rejected is None


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: RewardSpread(-0.1), "min_spread"),
        (lambda: RewardSpread(math.inf), "min_spread"),
        (lambda: RewardSpread(math.nan), "min_spread"),
        (lambda: RewardSpread("1"), "min_spread"),
        (lambda: RewardSpread(on_failure="accept"), "on_failure"),
        (lambda: MeanReward(math.nan, 1), "low"),
        (lambda: MeanReward(0, True), "high"),
        (lambda: MeanReward(1, 0), "high"),
        (lambda: GroupFilter(None), "function"),
        (lambda: GroupFilter(len, time_limit_s=0), "time_limit_s"),
        (lambda: GroupFilter(len, reason=""), "reason"),
    ],
)
def test_bad_arguments_are_refused(make, field) -> None:
    with pytest.raises(InvalidInputError) as caught:
        make()
    assert caught.value.field == field


def is_long(group):
    return len(group.trajectories) > 2


async def is_long_says_a_service(group):
    return np.bool_(is_long(group))


@pytest.mark.parametrize("function", [is_long, is_long_says_a_service])
def test_any_predicate_filters(start, group, function) -> None:
    hooks = start(GroupFilter(function), GroupFilter(function, reason="too short"))
    assert answer(hooks.finish_group(group(3))) == Verdict(group=group(3))
    name = function.__name__
    assert answer(hooks.finish_group(group(2))).rejected == f"hooks[0] (GroupFilter of {name}): {name} returned False"
    hooks = start(GroupFilter(function, reason="too short"))
    assert answer(hooks.finish_group(group(2))).rejected == f"hooks[0] (GroupFilter of {name}): too short"


@pytest.mark.parametrize("value", [None, 1, "yes", np.float64(1), [True]])
def test_only_a_bool_is_an_answer(start, group, value) -> None:
    with pytest.raises(HookError, match=r"returned .*, expected True or False"):
        answer(start(GroupFilter(lambda group: value, on_failure="raise")).finish_group(group()))


def test_a_coroutine_in_a_lambda_is_no_answer(start, group) -> None:
    unused = is_long_says_a_service(group(2))
    hooks = start(GroupFilter(lambda group: unused))
    assert "returned coroutine" in answer(hooks.finish_group(group(2))).rejected
    assert inspect.getcoroutinestate(unused) == inspect.CORO_CLOSED
