"""Rewards from functions and from tasks; what is no finite number is a failure."""

from __future__ import annotations

import functools
import inspect
from concurrent.futures import Future
from typing import Any

import msgspec
import numpy as np
import pytest

from longtail.engine.errors import InvalidInputError
from longtail.engine.tasks import load_task
from longtail.hooks import HookError, RewardFunction, TaskReward


def answer(future: Future[Any]) -> Any:
    return future.result(20.0)


class Judge:
    """A callable object."""

    def __call__(self, trajectory):
        return len(trajectory.output_token_ids)


class AsyncJudge(Judge):
    async def __call__(self, trajectory):
        return super().__call__(trajectory)


async def scaled(factor, trajectory):
    return factor * len(trajectory.output_token_ids)


@pytest.mark.parametrize(
    "function", [lambda one: 3, Judge(), AsyncJudge(), functools.partial(scaled, 1.0), lambda one: np.float32(3)]
)
def test_any_callable_sets_the_reward_and_nothing_else(start, trajectory, function) -> None:
    hooks = start(RewardFunction(function, on_failure="raise"))
    after = answer(hooks.finish_trajectory(trajectory()))
    assert after == trajectory(reward=3.0)
    assert type(after.reward) is float


@pytest.mark.parametrize(("value", "reward"), [(True, 1.0), (False, 0.0), (np.bool_(True), 1.0), (np.int64(-2), -2.0)])
def test_bools_and_numpy_scalars_are_numbers(start, trajectory, value, reward) -> None:
    after = answer(start(RewardFunction(lambda one: value, on_failure="raise")).finish_trajectory(trajectory()))
    assert after.reward == reward
    assert msgspec.json.encode(after)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1.0", [1.0], np.array([1.0, 2.0]), np.nan])
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_what_is_no_finite_number_is_a_failure_that_names_the_function(start, trajectory, value, kind) -> None:
    def judge(one):
        return value

    async def async_judge(one):
        return value

    function = judge if kind == "plain" else async_judge
    with pytest.raises(HookError) as caught:
        answer(start(RewardFunction(function, on_failure="raise")).finish_trajectory(trajectory()))
    assert caught.value.hook == f"hooks[0] (RewardFunction of {function.__name__})"
    if not isinstance(value, np.ndarray):
        assert f"{function.__name__} returned" in caught.value.what
        assert "expected a finite number" in caught.value.what


def test_a_coroutine_in_a_lambda_is_no_reward(start, trajectory) -> None:
    unused = scaled(1, trajectory())
    with pytest.raises(HookError, match=r"returned coroutine .* expected a finite number"):
        answer(start(RewardFunction(lambda one: unused, on_failure="raise")).finish_trajectory(trajectory()))
    assert inspect.getcoroutinestate(unused) == inspect.CORO_CLOSED


def test_limits_are_passed_on(start, trajectory, group) -> None:
    hooks = start(RewardFunction(lambda one: float("nan"), on_failure="ignore"))
    assert answer(hooks.finish_trajectory(trajectory())) == trajectory()
    assert RewardFunction(Judge(), time_limit_s=3).time_limit_s == 3.0
    hooks = start(RewardFunction(lambda one: float("nan")))
    answer(hooks.finish_trajectory(trajectory()))
    assert "nan" in answer(hooks.finish_group(group())).rejected


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"function": 3}, "function"),
        ({"function": Judge}, "function"),
        ({"function": Judge(), "time_limit_s": -1}, "time_limit_s"),
        ({"function": Judge(), "on_failure": "zero"}, "on_failure"),
    ],
)
def test_bad_arguments_are_refused(arguments, field) -> None:
    with pytest.raises(InvalidInputError) as caught:
        RewardFunction(**arguments)
    assert caught.value.field == field


# ---- tasks -------------------------------------------------------------------------------------------------------


def test_a_task_scores_right_and_wrong_answers(start, trajectory) -> None:
    (prompt,) = load_task("chain_sum", 1, seed=1)
    hooks = start(TaskReward("chain_sum"))
    right = prompt.metadata["entry"]["answer"]
    for text, reward in ((f"<answer>{right}</answer>", 1.0), ("<answer>-1</answer>", 0.0), ("", 0.0)):
        after = answer(hooks.finish_trajectory(trajectory(text=text, metadata=prompt.metadata)))
        assert after == trajectory(text=text, metadata=prompt.metadata, reward=reward)


@pytest.mark.parametrize(
    ("changes", "what"), [({"text": None}, "trajectory.text"), ({"metadata": {}}, "load_task"), ({}, "load_task")]
)
def test_a_trajectory_that_cannot_be_scored_is_a_failure_not_a_0(start, trajectory, changes, what) -> None:
    (prompt,) = load_task("chain_sum", 1, seed=1)
    if "text" in changes:
        changes = changes | {"metadata": prompt.metadata}
    with pytest.raises(HookError, match=what):
        answer(start(TaskReward("chain_sum", on_failure="raise")).finish_trajectory(trajectory(**changes)))


def test_an_unknown_task_is_refused_at_once_with_close_names() -> None:
    with pytest.raises(InvalidInputError, match="chain_sum"):
        TaskReward("chain_sums")


def test_a_missing_package_is_found_at_once_not_scored_as_0(monkeypatch) -> None:
    import sys

    from longtail.engine.tasks import TaskUnavailableError

    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(TaskUnavailableError):
        TaskReward("chain_sum")
