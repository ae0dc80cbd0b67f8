"""What a round submits: its arguments, checked, and its members.

Nothing here knows how requests reach the engine, so the library facades and the HTTP route share it. What comes back is
`round_collector.py`'s.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longtail.engine.config import MAX_SEED, SamplingConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.prompts import PromptLimits, Tokenizer, TokenPrompt, tokenize_prompts
from longtail.engine.trajectory import (
    Trajectory,
)
from longtail.engine.tree_members import check_budgets, checked_width, places, tree_seed
from longtail.scheduler.limits import MAX_GROUP_SIZE, MAX_ID_CHARS, MAX_TARGET_GROUPS
from longtail.scheduler.metadata import RolloutMetadata
from longtail.scheduler.tree_place import TreePlace


@dataclass(frozen=True, slots=True)
class MemberPlan:
    """One request to submit.

    Attributes:
        request_id: of the request; a trajectory that goes on has another one each time.
        max_tokens: output tokens that it may have in all.
        index: place in the group, which is not that of the metadata when siblings have ended before.
        prior: the trajectory that it goes on with.

    """

    request_id: str
    prompt: TokenPrompt
    sampling: SamplingConfig
    metadata: RolloutMetadata
    seed: int | None
    max_tokens: int
    trajectory_id: str
    index: int
    prior: Trajectory | None = None

    @property
    def has_late_text(self) -> bool:
        """Its text is made when it has ended, and vLLM's front end does not look for stop strings.

        It does not know what there was before, or does not look for what the scheduler does.
        """
        metadata = self.metadata
        return metadata.num_prior_tokens > 0 or metadata.tree is not None or metadata.stop_at_boxed

    @property
    def token_ids(self) -> list[int]:
        """What the engine is given: the prompt, and the output so far."""
        return self.prompt.token_ids + self.prior.output_token_ids if self.prior else self.prompt.token_ids


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """A checked round, ready to submit."""

    round_id: str
    target_groups: int
    group_size: int
    prompts: list[TokenPrompt]
    sampling: SamplingConfig
    can_fork: bool = False

    @property
    def parks(self) -> bool:
        """KV is parked under the members' request ids."""
        return self.can_fork or self.sampling.tree is not None

    def _tree(self, group_id: str, seed: int | None) -> dict[int, TreePlace]:
        if (spec := self.sampling.tree) is None:
            return {}
        return places(spec, tree_seed(seed, f"{self.round_id}/{group_id}"), [None] * self.group_size, [])

    def members(self) -> Iterator[MemberPlan]:
        """Every member, group by group."""
        for position, prompt in enumerate(self.prompts):
            seed = prompt.seed
            if seed is None and self.sampling.seed is not None:
                seed = self.sampling.seed + position * self.group_size
            tree = self._tree(prompt.group_id, seed)
            for index in range(self.group_size):
                request_id = f"{self.round_id}/{prompt.group_id}/{index}"
                yield MemberPlan(
                    request_id,
                    prompt,
                    self.sampling,
                    RolloutMetadata(
                        round=self.round_id,
                        target_groups=self.target_groups,
                        group=prompt.group_id,
                        group_size=self.group_size,
                        index=index,
                        park=request_id if self.parks else None,
                        stop=self.sampling.stop if tree or self.sampling.stop_at_boxed else (),
                        stop_at_boxed=self.sampling.stop_at_boxed,
                        can_fork=self.can_fork,
                        tree=tree.get(index),
                    ),
                    None if seed is None else seed + index,
                    budget_of(self.sampling, prompt, index),
                    trajectory_id=request_id,
                    index=index,
                )


def budget_of(sampling: SamplingConfig, prompt: TokenPrompt, index: int) -> int:
    """Output tokens that a member of a prompt's group may have in all."""
    budget = sampling.max_tokens if prompt.max_tokens is None else prompt.max_tokens[index]
    return budget if sampling.tree is None else min(budget, sampling.tree.max_tokens)


def num_groups_for(target_groups: int, over_provision: float, available: int) -> int:
    """Groups that a round submits: `over_provision` times its target, as many as there are."""
    return math.ceil(min(over_provision * target_groups, available))


def plan_round(
    prompts: Sequence[Any],
    *,
    group_size: int,
    target_groups: int | None,
    over_provision: float | None,
    sampling: SamplingConfig,
    round_id: str | None,
    tokenizer: Tokenizer | None,
    limits: PromptLimits,
    max_members: int | None = None,
    can_fork: bool = False,
) -> RoundPlan:
    """Check the arguments of a round and tokenise its prompts.

    With `over_provision` r only the first `ceil(r * target_groups)` prompts are used, as many as there are. A round
    of more than `max_members` is refused before there is any work.

    Raises:
        InvalidInputError: names the argument.

    """
    group_size = checked_width(group_size, sampling, can_fork=can_fork)
    round_id = check_arguments(group_size, target_groups, over_provision, sampling, round_id, tokenizer)
    if over_provision is not None:
        if target_groups is None:
            raise InvalidInputError("over_provision", "target_groups with it", over_provision)
        if isinstance(prompts, Sequence):
            prompts = prompts[: num_groups_for(target_groups, over_provision, len(prompts))]
    if max_members is not None and isinstance(prompts, Sequence) and len(prompts) * group_size > max_members:
        what = f"at most {max_members} members in a round, {len(prompts)} prompts x group_size"
        raise InvalidInputError("group_size", what, group_size)
    checked = tokenize_prompts(prompts, group_size, tokenizer, limits)
    check_budgets(checked, sampling)
    if sampling.seed is not None and sampling.seed + len(checked) * group_size > MAX_SEED:
        raise InvalidInputError("sampling.seed", f"room for {len(checked) * group_size} seeds", sampling.seed)
    if target_groups is None:
        target_groups = len(checked)
    elif target_groups > len(checked):
        raise InvalidInputError("target_groups", f"at most the {len(checked)} prompts given", target_groups)
    return RoundPlan(round_id, target_groups, group_size, checked, sampling, can_fork)


def check_arguments(
    group_size: int,
    target_groups: int | None,
    over_provision: float | None,
    sampling: SamplingConfig,
    round_id: str | None,
    tokenizer: Tokenizer | None,
    *,
    has_boundary_hook: bool = False,
) -> str:
    """Check what the caller says of a round, prompts aside; the round's id, a random one if it has none.

    Raises:
        InvalidInputError: names the argument.

    """
    check_count("group_size", group_size, MAX_GROUP_SIZE)
    for name in ("stop", "boundary_strings", "stop_at_boxed"):
        if (value := getattr(sampling, name)) and tokenizer is None:
            raise InvalidInputError(f"sampling.{name}", "nothing, because this engine has no tokenizer", value)
    if sampling.has_boundaries and not has_boundary_hook:
        where = next(name for name in _BOUNDARY_FIELDS if getattr(sampling, name))
        what = "nothing, without a round that carries over and a hook with on_boundary"
        raise InvalidInputError(f"sampling.{where}", what, getattr(sampling, where))
    if round_id is None:
        round_id = uuid.uuid4().hex[:12]
    elif not isinstance(round_id, str) or not 0 < len(round_id) <= MAX_ID_CHARS:
        raise InvalidInputError("round_id", f"1 to {MAX_ID_CHARS} characters", round_id)
    if target_groups is not None:
        check_count("target_groups", target_groups, MAX_TARGET_GROUPS)
    if over_provision is not None:
        number = isinstance(over_provision, (int, float)) and not isinstance(over_provision, bool)
        if not number or not math.isfinite(over_provision) or over_provision < 1:
            raise InvalidInputError("over_provision", "a finite number >= 1", over_provision)
    return round_id


_BOUNDARY_FIELDS = ("boundary_every", "boundary_token_ids", "boundary_strings")


def check_count(name: str, value: object, high: int) -> None:
    """`value` is an integer from 1 to `high`, or `InvalidInputError`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise InvalidInputError(name, f"an integer in [1, {high}]", value)
