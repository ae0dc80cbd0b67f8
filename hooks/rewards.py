"""Hooks that set `Trajectory.reward`. One that cannot tell the reward fails; it never makes it 0."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from longtail.engine import tasks
from longtail.engine.trajectory import Trajectory
from longtail.hooks.binding import checked_on_failure, checked_time_limit, is_coroutine_function
from longtail.hooks.checks import checked_reward
from longtail.hooks.errors import InvalidInputError
from longtail.hooks.protocol import DEFAULT_ON_FAILURE, DEFAULT_TIME_LIMIT_S, OnFailure


class RewardFunction:
    """The reward is what `function(trajectory)` returns, or its coroutine.

    A finite number is a reward: an int or a float, a bool as 0 and 1, or a NumPy or torch scalar. Anything else, NaN
    included, is a failure of the hook.

    Args:
        function: a plain or a coroutine function of one trajectory.
        time_limit_s: how long one call may take, in seconds.
        on_failure: what a failed call leads to, see `longtail.hooks.protocol`.

    Raises:
        InvalidInputError: an argument is not what it should be.

    """

    def __init__(
        self,
        function: Callable[[Trajectory], float | Awaitable[float]],
        *,
        time_limit_s: float = DEFAULT_TIME_LIMIT_S,
        on_failure: OnFailure = DEFAULT_ON_FAILURE,
    ) -> None:
        self._function: Callable[[Trajectory], Any] = checked_function(function)
        self.name = f"RewardFunction of {function_name(function)}"
        self.time_limit_s = checked_time_limit(time_limit_s, "time_limit_s")
        self.on_failure = checked_on_failure(on_failure, "on_failure")
        self.on_trajectory: Callable[[Trajectory], Any] = (
            self._reward_later if is_coroutine_function(function) else self._reward
        )

    def _reward(self, trajectory: Trajectory) -> Trajectory:
        return self._set(trajectory, self._function(trajectory))

    async def _reward_later(self, trajectory: Trajectory) -> Trajectory:
        return self._set(trajectory, await self._function(trajectory))

    def _set(self, trajectory: Trajectory, value: object) -> Trajectory:
        reward = checked_reward(value, f"{function_name(self._function)} returned")
        return msgspec.structs.replace(trajectory, reward=reward)


class TaskReward:
    """The reward is the score, 0 to 1, that a task's own verifier gives the text (`longtail.engine.tasks.score`).

    Fails for a trajectory without text, and for one whose prompt is not of this task. Building it imports
    reasoning-gym, between one and two seconds of CPU.

    Args:
        task: a name that `longtail.engine.tasks.load_task` takes.
        time_limit_s: how long one verification may take, in seconds.
        on_failure: what a failed call leads to, see `longtail.hooks.protocol`.

    Raises:
        InvalidInputError: there is no such task, or an argument is not what it should be.
        TaskUnavailableError: reasoning-gym is not installed.

    """

    def __init__(
        self,
        task: str,
        *,
        time_limit_s: float = DEFAULT_TIME_LIMIT_S,
        on_failure: OnFailure = DEFAULT_ON_FAILURE,
    ) -> None:
        # `score` takes a package that is missing for a verifier that raises, which counts as 0: find out here.
        if task not in (names := tasks.task_names()):
            close = difflib.get_close_matches(str(task), names, n=5, cutoff=0.5) or list(tasks.DEMO_TASKS)
            raise InvalidInputError("task", f"one of {len(names)} task names such as " + ", ".join(close), task)
        self.task = task
        self.name = f"TaskReward of {task}"
        self.time_limit_s = checked_time_limit(time_limit_s, "time_limit_s")
        self.on_failure = checked_on_failure(on_failure, "on_failure")

    def on_trajectory(self, trajectory: Trajectory) -> Trajectory:
        if trajectory.text is None:
            raise InvalidInputError("trajectory.text", "the detokenized output, which a task's score needs", None)
        score = tasks.score(self.task, trajectory.text, trajectory.metadata)
        return msgspec.structs.replace(trajectory, reward=checked_reward(score, "the verifier returned"))


def checked_function(function: object) -> Callable[..., Any]:
    """`function` if it can be called.

    Raises:
        InvalidInputError: it cannot, or it is a class.

    """
    if not callable(function) or inspect.isclass(function):
        raise InvalidInputError("function", "a plain or a coroutine function", function)
    return function


def function_name(function: object) -> str:
    """What messages call it."""
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__
