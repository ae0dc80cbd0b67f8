"""Hooks that accept or reject complete groups. A group that cannot be judged is a failure, not an accept."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Awaitable, Callable
from typing import Any

from longtail.engine.trajectory import Group
from longtail.hooks.binding import checked_on_failure, checked_time_limit, is_coroutine_function
from longtail.hooks.checks import WrongAnswer, described, plain_scalar
from longtail.hooks.errors import InvalidInputError
from longtail.hooks.protocol import DEFAULT_ON_FAILURE, DEFAULT_TIME_LIMIT_S, Accept, OnFailure, Reject
from longtail.hooks.rewards import checked_function, function_name


class RewardSpread:
    """Rejects a group whose largest and smallest reward are not more than `min_spread` apart.

    With 0, the default, that is a group whose rewards are all the same, which gives no group-relative advantage
    (DAPO's dynamic sampling keeps groups with a standard deviation above 0).

    Args:
        min_spread: finite, at least 0, in units of the reward.
        on_failure: what a group without rewards leads to, see `longtail.hooks.protocol`.

    Raises:
        InvalidInputError: an argument is not what it should be.

    """

    def __init__(self, min_spread: float = 0.0, *, on_failure: OnFailure = DEFAULT_ON_FAILURE) -> None:
        self.min_spread = _checked_number(min_spread, "min_spread")
        if not 0 <= self.min_spread < math.inf:
            raise InvalidInputError("min_spread", "a finite number >= 0", min_spread)
        self.on_failure = checked_on_failure(on_failure, "on_failure")

    def on_group(self, group: Group) -> Accept | Reject:
        rewards = rewards_of(group)
        spread = max(rewards) - min(rewards)
        if spread > self.min_spread:
            return Accept()
        return Reject(f"rewards spread over {spread:g}, not more than {self.min_spread:g}")


class MeanReward:
    """Rejects a group whose mean reward is not in `[low, high]`: a prompt that is too hard or too easy.

    Args:
        low: in units of the reward; `-math.inf` for no bound.
        high: at least `low`; `math.inf` for no bound.
        on_failure: what a group without rewards leads to, see `longtail.hooks.protocol`.

    Raises:
        InvalidInputError: an argument is not what it should be.

    """

    def __init__(self, low: float, high: float, *, on_failure: OnFailure = DEFAULT_ON_FAILURE) -> None:
        self.low, self.high = _checked_number(low, "low"), _checked_number(high, "high")
        if self.low > self.high:
            raise InvalidInputError("high", f"a number >= low ({self.low:g})", high)
        self.on_failure = checked_on_failure(on_failure, "on_failure")

    def on_group(self, group: Group) -> Accept | Reject:
        # Exact: the mean of equal rewards is that reward, whatever their number.
        mean = statistics.mean(rewards_of(group))
        if self.low <= mean <= self.high:
            return Accept()
        return Reject(f"mean reward {mean:g} is not in [{self.low:g}, {self.high:g}]")


class GroupFilter:
    """Accepts a group if `function(group)`, or its coroutine, returns true.

    Only a bool (Python's, NumPy's or torch's) is an answer, anything else a failure of the hook.

    Args:
        function: a plain or a coroutine function of one group.
        reason: of a rejection; names the function by default.
        time_limit_s: how long one call may take, in seconds.
        on_failure: what a failed call leads to, see `longtail.hooks.protocol`.

    Raises:
        InvalidInputError: an argument is not what it should be.

    """

    def __init__(
        self,
        function: Callable[[Group], bool | Awaitable[bool]],
        *,
        reason: str | None = None,
        time_limit_s: float = DEFAULT_TIME_LIMIT_S,
        on_failure: OnFailure = DEFAULT_ON_FAILURE,
    ) -> None:
        self._function: Callable[[Group], Any] = checked_function(function)
        self.name = f"GroupFilter of {function_name(function)}"
        self._rejection = Reject(f"{function_name(function)} returned False" if reason is None else reason)
        self.time_limit_s = checked_time_limit(time_limit_s, "time_limit_s")
        self.on_failure = checked_on_failure(on_failure, "on_failure")
        self.on_group: Callable[[Group], Any] = self._judge_later if is_coroutine_function(function) else self._judge

    def _judge(self, group: Group) -> Accept | Reject:
        return self._decide(self._function(group))

    async def _judge_later(self, group: Group) -> Accept | Reject:
        return self._decide(await self._function(group))

    def _decide(self, value: object) -> Accept | Reject:
        verdict = plain_scalar(value)
        if not isinstance(verdict, bool):
            if inspect.iscoroutine(value):
                value.close()
            raise WrongAnswer(f"{function_name(self._function)} returned {described(value)}, expected True or False")
        return Accept() if verdict else self._rejection


def rewards_of(group: Group) -> list[float]:
    """The rewards of the group's trajectories.

    Raises:
        InvalidInputError: there are no trajectories, or one has no finite reward.

    """
    if not group.trajectories:
        raise InvalidInputError(f"group {group.group_id}.trajectories", "at least one", group.trajectories)
    rewards = []
    for trajectory in group.trajectories:
        if trajectory.reward is None or not math.isfinite(trajectory.reward):
            where = f"trajectory {trajectory.trajectory_id}.reward"
            raise InvalidInputError(where, "a finite number, from a reward hook", trajectory.reward)
        rewards.append(trajectory.reward)
    return rewards


def _checked_number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise InvalidInputError(where, "a number", value)
    return float(value)
