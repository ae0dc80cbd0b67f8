"""Groups as padded tensors: which tokens are trained, what they were sampled with, and what they earned.

A trained token was sampled by the model, is not masked by the trajectory's `loss_mask`, and is not staler than the
bound. Everything else is context.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longtail.engine.trajectory import Group, Trajectory
from longtail.hooks.tree_advantages import tree_advantages
from longtail.trainer_bridge.errors import InvalidInputError
from longtail.trainer_bridge.grpo_config import GrpoConfig

_STD_FLOOR = 1e-6


@dataclass(frozen=True)
class Batch:
    """Trajectories as tensors, on one device.

    Attributes:
        token_ids: int64 [N, L], padded.
        attention_mask: int64 [N, L], 0 at padding.
        mask: bool [N, L], the tokens that are trained.
        behaviour: float [N, L], log-probabilities under the behaviour policy.
        advantages: float [N].
        staleness: int64 [N, L], in versions; -1 where the model did not sample the token.
        old: float [N, L], log-probabilities under the weights that the step began with; `None` for those of now.
        reference: float [N, L], log-probabilities under the reference model.

    """

    token_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    behaviour: Tensor
    advantages: Tensor
    staleness: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None

    def rows(self, indices: Tensor) -> Batch:
        """Some of the trajectories (int64 [n], on the batch's device), padded to the longest of them."""
        columns = self.attention_mask[indices].bool().any(0)
        return self._mapped(lambda x: x[indices][:, columns] if x.dim() == 2 else x[indices])

    def to(self, device: torch.device) -> Batch:
        """On another device."""
        return self._mapped(lambda x: x.to(device))

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Tensor | None] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        return dataclasses.replace(self, **{name: function(x) for name, x in tensors.items() if x is not None})


def group_advantages(rewards: Sequence[float], config: GrpoConfig) -> list[float]:
    """Reward minus the group's mean, over the standard deviation (with n - 1) if asked for; 0 where all are equal."""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    scale = statistics.stdev(rewards) + _STD_FLOOR if config.divide_by_std else 1.0
    return [(reward - mean) / scale for reward in rewards]


def build_batch(
    groups: Sequence[Group],
    config: GrpoConfig,
    version: int,
    *,
    pad_id: int = 0,
    pad_left: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Tensors of the members of complete groups, in their order.

    Args:
        groups: `Round.complete_groups`; all members have a reward.
        config: `advantage`, `divide_by_std` and `max_staleness` matter here.
        version: of the weights that are trained; the age of a token is the distance to its own.
        pad_id: any token id. A causal model's outputs at real tokens do not depend on it.
        pad_left: put the padding before the prompt.
        dtype: of the float tensors.

    Raises:
        InvalidInputError: a group is incomplete, was rejected or has one member; a trajectory has no prompt, no finite
            reward, a log-probability that is none, or a version that is not a number.

    """
    rows: list[tuple[Tensor, ...]] = []
    advantages: list[float] = []
    for i, group in enumerate(groups):
        if not group.complete or group.rejected is not None or len(group.trajectories) < 2:
            got = f"complete={group.complete}, rejected={group.rejected!r}, {len(group.trajectories)} trajectories"
            raise InvalidInputError(f"groups[{i}]", "a complete group, not rejected, of 2 trajectories or more", got)
        rewards: list[float] = []
        for j, trajectory in enumerate(group.trajectories):
            path = f"groups[{i}].trajectories[{j}]"
            if trajectory.reward is None or not math.isfinite(trajectory.reward):
                raise InvalidInputError(f"{path}.reward", "a finite number", trajectory.reward)
            rewards.append(trajectory.reward)
            rows.append(_row(trajectory, path, config, version, dtype))
        if config.advantage == "tree":
            advantages += tree_advantages(group, divide_by_std=config.divide_by_std)
        else:
            advantages += group_advantages(rewards, config)
    if not rows:
        raise InvalidInputError("groups", "at least one group", [])
    columns, paddings = zip(*rows, strict=True), (pad_id, 0, False, 0.0, -1)
    side = "left" if pad_left else "right"
    padded = (pad_sequence(list(column), True, pad, side) for column, pad in zip(columns, paddings, strict=True))
    token_ids, attention_mask, mask, behaviour, staleness = padded
    return Batch(token_ids, attention_mask, mask, behaviour, torch.tensor(advantages, dtype=dtype), staleness)


def _row(trajectory: Trajectory, path: str, config: GrpoConfig, version: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Token ids, attention mask, mask, behaviour and staleness of one trajectory, each [length]."""
    num_prompt = len(trajectory.prompt_token_ids)
    if num_prompt == 0:
        raise InvalidInputError(f"{path}.prompt_token_ids", "at least one token", [])
    ages: list[int] = []
    for span in trajectory.weight_versions:
        if not span.version.isdecimal():
            raise InvalidInputError(f"{path}.weight_versions", "decimal numbers", span.version)
        ages += [abs(version - int(span.version))] * (span.end - span.start)
    bound = math.inf if config.max_staleness is None else config.max_staleness
    source = trajectory.source_mask
    mask = [
        bool(sampled and trained and age <= bound)
        for sampled, trained, age in zip(source, trajectory.loss_mask, ages, strict=True)
    ]
    behaviour = [logprob if kept else 0.0 for logprob, kept in zip(trajectory.logprobs, mask, strict=True)]
    for t, logprob in enumerate(behaviour):
        if not (math.isfinite(logprob) and logprob <= 1e-3):  # the engine's rounding may put a certain token above 0
            raise InvalidInputError(f"{path}.logprobs[{t}]", "a finite log-probability", logprob)
    staleness = [age if sampled else -1 for age, sampled in zip(ages, source, strict=True)]
    token_ids = [*trajectory.prompt_token_ids, *trajectory.output_token_ids]
    return (
        torch.tensor(token_ids, dtype=torch.int64),
        torch.ones(len(token_ids), dtype=torch.int64),
        torch.tensor([False] * num_prompt + mask),
        torch.tensor([0.0] * num_prompt + behaviour, dtype=dtype),
        torch.tensor([-1] * num_prompt + staleness),
    )
