"""Members of a tree as the front end sees them: what it says of each when it submits them, and whose branch each was.

The tokens that a path has of another one are sent by their owner only. So a path that has ended waits for its parent,
which is stopped no later than the round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from longtail.engine.config import MAX_SEED, SamplingConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.trajectory import Trajectory
from longtail.engine.trajectory_parts import branches, num_computed_before
from longtail.scheduler.path_values import sums_of
from longtail.scheduler.tree_place import BirthReport, EndedPath, TreePlace
from longtail.scheduler.tree_policy import TreeSpec

if TYPE_CHECKING:
    from longtail.engine.prompts import TokenPrompt
    from longtail.engine.rounds import MemberPlan

T = TypeVar("T")


def checked_width(group_size: int, sampling: SamplingConfig, *, can_fork: bool) -> int:
    """Members of a group: `group_size`, or the width of its tree.

    Raises:
        InvalidInputError: they contradict each other, or `can_fork` is asked for of a tree.

    """
    if not isinstance(sampling, SamplingConfig):
        raise InvalidInputError("sampling", "a SamplingConfig", sampling)
    if can_fork and sampling.tree is not None:
        raise InvalidInputError("can_fork", "false, because the trees of this round grow by themselves", can_fork)
    return sampling.num_members(group_size)


def check_budgets(prompts: Sequence[TokenPrompt], sampling: SamplingConfig) -> None:
    """The members of a tree, which have tokens of each other, have one budget.

    Raises:
        InvalidInputError: names the prompt.

    """
    for index, prompt in enumerate(prompts):
        if sampling.tree is not None and prompt.max_tokens is not None and len(set(prompt.max_tokens)) > 1:
            raise InvalidInputError(f"prompts[{index}].max_tokens", "one budget for a whole tree", prompt.max_tokens)


def tree_seed(seed: int | None, name: str) -> int:
    """Seed of the decisions of a tree whose first member has `seed`; without one it follows from the group's name."""
    digest = hashlib.blake2b(f"tree {name if seed is None else seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (MAX_SEED + 1)


def places(
    spec: TreeSpec, seed: int, members: Sequence[Trajectory | None], park_keys: Sequence[str]
) -> dict[int, TreePlace]:
    """What the scheduler is told of the paths of a tree that have not ended, by index; of those that have, with one."""
    over = {
        index: member
        for index, member in enumerate(members)
        if member is not None and (member.ended_by_itself or member.was_dismissed)
    }
    ended = [
        EndedPath(
            path=index,
            token_ids=member.output_token_ids,
            by_itself=member.finish_reason == "stop",
            sums=_sums(spec, member),
            park=park_keys[index] if park_keys else None,
        )
        for index, member in over.items()
    ]
    left = [index for index in range(len(members)) if index not in over]
    return {
        index: TreePlace(
            spec=spec,
            seed=seed,
            path=index,
            has_begun=(member := members[index]) is not None,
            sums=[] if member is None else _sums(spec, member),
            ended=ended if index == left[0] else [],
        )
        for index in left
    }


def _sums(spec: TreeSpec, member: Trajectory) -> list[float]:
    return [] if spec.split == "uniform" else sums_of(spec.split, member.logprobs, spec.segment_tokens)


def born(plan: MemberPlan, birth: BirthReport, parent: Trajectory) -> MemberPlan:
    """A member that began as a branch, as if it had been submitted with the tokens that it has of its parent."""
    (prior,) = branches(parent, birth.at, {plan.index: plan.trajectory_id}, [plan.seed])
    assert prior.branch is not None
    branch = msgspec.structs.replace(prior.branch, reason=birth.reason, probability=birth.probability)
    prior = msgspec.structs.replace(prior, branch=branch)
    metadata = msgspec.structs.replace(
        plan.metadata,
        num_prior_tokens=birth.at,
        num_drawn_tokens=0,
        num_computed_tokens=num_computed_before(prior),
    )
    return replace(plan, metadata=metadata, prior=prior)


class Orphans(Generic[T]):
    """Items of members whose parents have not ended."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, int], list[T]] = {}

    def wait(self, group: str, parent: int, item: T) -> None:
        """An item that needs the member `parent` of a group."""
        self._waiting.setdefault((group, parent), []).append(item)

    def of(self, group: str, parent: int) -> Iterable[T]:
        """The items that needed this one, which has ended."""
        return self._waiting.pop((group, parent), ())
