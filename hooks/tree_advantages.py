"""Advantages of trajectories that branched: each is compared with its siblings at every place where it left some.

Trajectories of a group form a forest over their prompt: one that has a `branch` shares the tokens before it with the
one that it left. A *level* of a trajectory is a place on its path, and the *subtree* of a level are the trajectories
that share the path up to there; the first level is the prompt, whose subtree is the group. TreePO (arXiv 2508.17445,
Eq. 5) takes the mean of `reward - mean reward of the subtree` over the levels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from longtail.engine.trajectory import Group, Trajectory
from longtail.hooks.errors import InvalidInputError
from longtail.hooks.filters import rewards_of

_STD_FLOOR = 1e-6


def shared_tokens(group: Group) -> list[list[int]]:
    """How many output tokens each two trajectories of a group share by their branches, [n][n]; with itself, all.

    Of one that left a trajectory that is not in the group any more, nothing is known before that.
    """
    members = {member.index: member for member in group.trajectories}
    owners = [_owners(members, member.index) for member in group.trajectories]
    return [[_common(mine, theirs) for theirs in owners] for mine in owners]


def tree_advantages(
    group: Group,
    *,
    segment_tokens: int | None = None,
    weights: Literal["equal", "size"] = "equal",
    divide_by_std: bool = False,
) -> list[float]:
    """The advantage of each trajectory, see the module; 0 for all where all rewards are equal.

    Args:
        group: all members have a reward.
        segment_tokens: levels are the prompt and every so many tokens of the path, as in TreePO, where a subtree that
            does not split for several levels counts as often. `None` takes each different subtree once.
        weights: of a level in the mean: `equal`, or the `size` of its subtree.
        divide_by_std: by the standard deviation (with n - 1) of the group's rewards.

    A level whose subtree is one trajectory says nothing, and is left out, unless it is the first.

    Raises:
        InvalidInputError: a reward is missing, or an argument is wrong.

    """
    if segment_tokens is not None and segment_tokens < 1:
        raise InvalidInputError("segment_tokens", "an integer >= 1, or None", segment_tokens)
    if weights not in ("equal", "size"):
        raise InvalidInputError("weights", "equal or size", weights)
    rewards = rewards_of(group)
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    scale = statistics.stdev(rewards) + _STD_FLOOR if divide_by_std else 1.0
    shared = shared_tokens(group)
    advantages = []
    for index, reward in enumerate(rewards):
        subtrees = _subtrees(shared[index], segment_tokens)
        sizes = [len(subtree) if weights == "size" else 1 for subtree in subtrees]
        gains = [reward - statistics.fmean(rewards[i] for i in subtree) for subtree in subtrees]
        total = math.fsum(size * gain for size, gain in zip(sizes, gains, strict=True))
        advantages.append(total / sum(sizes) / scale)
    return advantages


def whiten(advantages: Sequence[float], num_tokens: Sequence[int]) -> list[float]:
    """Advantages of a batch with mean 0 and variance 1 over its trained tokens, of which each trajectory has so many.

    As TreePO's code does after the mean over levels, for the whole batch and not by group.

    Raises:
        InvalidInputError: the lengths differ.

    """
    if len(advantages) != len(num_tokens):
        raise InvalidInputError("num_tokens", f"{len(advantages)} numbers, one an advantage", num_tokens)
    total = sum(num_tokens)
    if not total:
        return list(advantages)
    mean = math.fsum(a * n for a, n in zip(advantages, num_tokens, strict=True)) / total
    variance = math.fsum((a - mean) ** 2 * n for a, n in zip(advantages, num_tokens, strict=True)) / total
    return [(a - mean) / (math.sqrt(variance) + _STD_FLOOR) for a in advantages]


def _subtrees(shared: Sequence[int], segment_tokens: int | None) -> list[list[int]]:
    """Members that share the path of one trajectory, by level; `shared` is its row of `shared_tokens`."""
    # What all share is no level of its own.
    places = sorted(set(shared) - {min(shared)})
    deeper = places if segment_tokens is None else range(segment_tokens, max(shared), segment_tokens)
    everyone = range(len(shared))
    subtrees = ([index for index in everyone if shared[index] >= depth] for depth in deeper)
    return [list(everyone), *(subtree for subtree in subtrees if len(subtree) > 1)]


def _owners(members: Mapping[int, Trajectory], index: int) -> list[tuple[int, int]]:
    """Who has the tokens of a trajectory: `(index, end)`, from the prompt on."""
    path = [(index, len(members[index].output_token_ids))]
    # A group may be a selection, without some of those that others left.
    while (owner := members.get(path[-1][0])) is not None and (branch := owner.branch) is not None:
        path.append((branch.of, min(branch.at, path[-1][1])))
    return path[::-1]


def _common(mine: Sequence[tuple[int, int]], theirs: Sequence[tuple[int, int]]) -> int:
    shared = 0
    for (a, end), (b, other) in zip(mine, theirs, strict=False):
        if a != b:
            break
        shared = min(end, other)
        if end != other:
            break
    return shared
