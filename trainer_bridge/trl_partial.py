"""TRL on rounds that carry over: which prompts they get, and how the reward functions learn of it.

TRL asks for the completions of prompts that it has picked, and hands those prompts and their columns to the reward
functions. A round that carries over completes other groups than were begun in it. So TRL's pick serves as a clock: the
rounds draw from an order of their own over the same data set, each trajectory says its row, and every reward function
is wrapped, so that it is called with the prompts that the completions belong to.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np

from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Trajectory
from longtail.trainer_bridge.errors import InvalidInputError
from longtail.trainer_bridge.trl_settings import token_ids_of

#: The column in which the prompts of a round that carried over travel to the reward functions.
PROMPTS = "longtail_prompts"

_ROW = "row"
#: What the answer to TRL has besides columns.
_TAKEN = {PROMPTS, "prompt_ids", "completion_ids", "logprobs", "logprob_token_ids", "env_mask"}
# Far more than any run draws, and a length that everything can compute with.
_EPOCHS = 1 << 20


class EndlessPrompts(Sequence[Prompt]):
    """The trainer's data set over and over, each time in another order; the same for equal data sets and seeds.

    Position `p` is in epoch `p // len(dataset)`. The order is a permutation, or the data set's own if the trainer does
    not shuffle.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._rows = trainer.train_dataset
        self._order = functools.lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return len(self._rows) * _EPOCHS

    @overload
    def __getitem__(self, position: int) -> Prompt: ...
    @overload
    def __getitem__(self, position: slice) -> list[Prompt]: ...
    def __getitem__(self, position: int | slice) -> Prompt | list[Prompt]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        if not 0 <= position < len(self):
            raise IndexError(position)
        epoch, place = divmod(position, len(self._rows))
        row = int(self._order(epoch)[place])
        return Prompt(token_ids=self._token_ids(row), metadata={_ROW: row})

    def columns_of(self, trajectories: Sequence[Trajectory]) -> dict[str, list[Any]]:
        """The data set's columns for trajectories, `prompt` among them.

        Raises:
            InvalidInputError: a trajectory is not of this data set: the service goes on with prompts of another run.

        """
        rows = [trajectory.metadata.get(_ROW) for trajectory in trajectories]
        for row, trajectory in zip(rows, trajectories, strict=True):
            known = isinstance(row, int) and 0 <= row < len(self._rows)
            if not known or self._token_ids(row) != trajectory.prompt_token_ids:  # type: ignore[arg-type]
                where = f"trajectory {trajectory.trajectory_id}"
                raise InvalidInputError(where, "a prompt of the trainer's data set", trajectory.metadata)
        examples = [self._rows[row] for row in rows]
        return {name: [example[name] for example in examples] for name in examples[0]}

    def _token_ids(self, row: int) -> list[int]:
        return token_ids_of([self._rows[row]["prompt"]], self._trainer)[0]

    def _order_of(self, epoch: int) -> Any:
        if not self._trainer.args.shuffle_dataset:
            return range(len(self._rows))
        return np.random.default_rng((self._trainer.args.seed, epoch)).permutation(len(self._rows))


class RewardOfPrompts:
    """A reward function that gets the prompts of the completions, whichever TRL asked for.

    Has its name, under which TRL logs it. Without the column of trajectories, as in an evaluation, it changes nothing.
    """

    def __init__(self, function: Callable[..., Any], rollout: object) -> None:
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.rollout = rollout
        self.function = function

    def __call__(self, prompts: list[Any], **columns: Any) -> Any:
        return self.function(prompts=columns.pop(PROMPTS, prompts), **columns)


class AsyncRewardOfPrompts(RewardOfPrompts):
    """The same for a coroutine function."""

    async def __call__(self, prompts: list[Any], **columns: Any) -> Any:
        return await self.function(prompts=columns.pop(PROMPTS, prompts), **columns)


def reward_of_prompts(function: Callable[..., Any], rollout: object) -> RewardOfPrompts:
    """Wrap a plain or a coroutine function, or an object with such a `__call__`.

    Raises:
        InvalidInputError: it is none, such as the reward models that TRL runs itself.

    """
    is_model = isinstance(function, str) or hasattr(function, "forward")
    if is_model or inspect.isclass(function) or not callable(function):
        raise InvalidInputError("function", "a plain or a coroutine function", function)
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return (AsyncRewardOfPrompts if is_async else RewardOfPrompts)(function, rollout)


def check_partial(trainer: Any, rollout: object) -> None:
    """Refuse a trainer in which the other prompts would be taken for those that it asked for.

    Raises:
        InvalidInputError: names the setting and what it has to be.

    """
    for position, function in enumerate(trainer.reward_funcs):
        if not isinstance(function, RewardOfPrompts) or function.rollout is not rollout:
            why = "rollout.reward(function) with carry=True: TRL passes it the prompts that it asked for"
            raise InvalidInputError(f"reward_funcs[{position}]", why, function)
    if not hasattr(trainer.train_dataset, "__len__") or not hasattr(trainer.train_dataset, "__getitem__"):
        got = type(trainer.train_dataset).__name__
        raise InvalidInputError("train_dataset", "one with a length with carry=True, not a stream", got)
    if trainer.args.log_completions:
        why = "False with carry=True: TRL would log the prompts that it asked for"
        raise InvalidInputError("args.log_completions", why, True)
    if not trainer.vllm_importance_sampling_correction:
        why = "True with carry=True: part of a trajectory is of older weights"
        raise InvalidInputError("args.vllm_importance_sampling_correction", why, False)
    if taken := _TAKEN & set(trainer.train_dataset.column_names):
        raise InvalidInputError("train_dataset", "no column of these names with carry=True", sorted(taken))
