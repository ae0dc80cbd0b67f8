"""One round as the front end sees it: the members to submit, and the trajectories that come back.

`RoundPlan` says what to submit; `RoundCollector` turns final outputs into trajectories, groups and the `Round`. Neither
knows how requests reach the engine, so the library facades and the HTTP route share them.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from longtail.engine.config import MAX_SEED, SamplingConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.prompts import PromptLimits, Tokenizer, TokenPrompt, tokenize_prompts
from longtail.engine.trajectory import (
    MODEL_TOKEN,
    Group,
    Round,
    RoundStats,
    Timings,
    TokenCounts,
    Trajectory,
    VersionSpan,
)
from longtail.engine.trajectory_parts import joined, num_computed_before, segments_of
from longtail.scheduler.fork_order import ForkPoint
from longtail.scheduler.metadata import (
    MAX_GROUP_SIZE,
    MAX_ID_CHARS,
    MAX_TARGET_GROUPS,
    MemberReport,
    RolloutMetadata,
    report_of,
)

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


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

    def members(self) -> Iterator[MemberPlan]:
        """Every member, group by group."""
        for position, prompt in enumerate(self.prompts):
            seed = prompt.seed
            if seed is None and self.sampling.seed is not None:
                seed = self.sampling.seed + position * self.group_size
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
                        park=request_id if self.can_fork else None,
                        can_fork=self.can_fork,
                    ),
                    None if seed is None else seed + index,
                    self.sampling.max_tokens if prompt.max_tokens is None else prompt.max_tokens[index],
                    trajectory_id=request_id,
                    index=index,
                )


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
    if not isinstance(sampling, SamplingConfig):
        raise InvalidInputError("sampling", "a SamplingConfig", sampling)
    check_count("group_size", group_size, MAX_GROUP_SIZE)
    for name in ("stop", "boundary_strings"):
        if (strings := getattr(sampling, name)) and tokenizer is None:
            raise InvalidInputError(f"sampling.{name}", "no strings, because this engine has no tokenizer", strings)
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


@dataclass(slots=True)
class RoundCollector:
    """Turns the final outputs of one round into trajectories, and those into the `Round`.

    Attributes:
        plan: the round.
        num_forking: forks that the scheduler was asked for: their branches are pending too.

    """

    plan: RoundPlan
    num_forking: int = 0
    _members: dict[str, MemberPlan] = field(init=False)
    _pending: dict[str, MemberPlan] = field(init=False)
    _done: dict[str, list[Trajectory]] = field(init=False)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._pending = {member.request_id: member for member in self.plan.members()}
        self._members = dict(self._pending)
        self._done = {prompt.group_id: [] for prompt in self.plan.prompts}
        self._started = time.monotonic()

    @property
    def num_pending(self) -> int:
        """Members without a final output."""
        return len(self._pending) + self.num_forking

    @property
    def request_ids(self) -> list[str]:
        """Of all members, which are their trajectories' ids too."""
        return list(self._members)

    def pending(self, request_id: str) -> MemberPlan:
        """A member without a final output."""
        return self._pending[request_id]

    def add(self, request_id: str, segment: Trajectory) -> Trajectory:
        """Take what a member's request sampled; returns the whole trajectory."""
        member = self._pending.pop(request_id)
        trajectory = segment if member.prior is None else joined(member.prior, segment)
        self._done[trajectory.group_id].append(trajectory)
        return trajectory

    def find(self, trajectory_id: str) -> tuple[MemberPlan, Trajectory | None]:
        """A trajectory of the round: its plan, and what it became if it ended.

        Raises:
            InvalidInputError: there is none with this id.

        """
        member = self._members.get(trajectory_id)
        if member is None:
            raise InvalidInputError("trajectory_id", f"a trajectory of round {self.plan.round_id!r}", trajectory_id)
        done = (one for one in self._done[member.prompt.group_id] if one.trajectory_id == trajectory_id)
        return member, next(done, None)

    def num_members(self, group_id: str) -> int:
        """Trajectories of a group, branches included."""
        return sum(member.prompt.group_id == group_id for member in self._members.values())

    def expect(self, branches: Sequence[Trajectory], of: MemberPlan, point: ForkPoint) -> list[MemberPlan]:
        """Branches of a member join the round; returns them as members to submit."""
        plans = [
            replace(
                of,
                request_id=branch.trajectory_id,
                metadata=msgspec.structs.replace(
                    of.metadata,
                    index=point.index + place,
                    group_size=point.index + len(branches),
                    park=branch.trajectory_id,
                    num_prior_tokens=point.at,
                    num_computed_tokens=num_computed_before(branch),
                    num_drawn_tokens=0,
                    stop=of.sampling.stop if point.at else (),
                ),
                seed=branch.seed,
                trajectory_id=branch.trajectory_id,
                index=branch.index,
                prior=branch,
            )
            for place, branch in enumerate(branches)
        ]
        for plan in plans:
            self._members[plan.trajectory_id] = self._pending[plan.request_id] = plan
        return plans

    def round(self, counts: dict[str, Any]) -> Round:
        """The whole round; `counts` are the scheduler's (`RoundCounts` as a dict).

        Every submitted member is in it: nothing is pending when this is called.
        """
        assert not self._pending, f"{len(self._pending)} members have no final output"
        groups = [
            Group(
                group_id=prompt.group_id,
                trajectories=sorted(self._done[prompt.group_id], key=lambda trajectory: trajectory.index),
                complete=all(t.ended_by_itself for t in self._done[prompt.group_id]),
                metadata=prompt.metadata,
            )
            for prompt in self.plan.prompts
        ]
        return Round(
            round_id=self.plan.round_id,
            target_groups=self.plan.target_groups,
            groups=groups,
            stats=_stats(groups, counts, time.monotonic() - self._started),
        )


def _stats(groups: list[Group], counts: dict[str, Any], seconds: float) -> RoundStats:
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    num_complete = sum(group.complete for group in groups)
    num_cut = sum(any(trajectory.was_cut for trajectory in group.trajectories) for group in groups)
    return RoundStats(
        num_submitted_groups=len(groups),
        num_complete_groups=num_complete,
        num_cut_groups=num_cut,
        num_failed_groups=len(groups) - num_complete - num_cut,
        num_cut_members=sum(trajectory.was_cut for trajectory in trajectories),
        num_output_tokens=sum(trajectory.num_own_tokens for trajectory in trajectories),
        num_kept_tokens=sum(t.num_own_tokens for group in groups if group.complete for t in group.trajectories),
        num_scheduled_tokens=sum(trajectory.tokens.scheduled for trajectory in trajectories),
        num_recomputed_tokens=sum(trajectory.tokens.recomputed for trajectory in trajectories),
        num_steps=counts["num_steps"],
        idle_slot_steps=counts["idle_slot_steps"],
        peak_running=counts["peak_running"],
        seconds=seconds,
    )


def segment_of(member: MemberPlan, output: RequestOutput) -> Trajectory:
    """The final output of one request as a trajectory of its own, without what it had before."""
    completion: Any = output.outputs[0]
    token_ids = list(completion.token_ids)
    report, num_prior = report_of(output.kv_transfer_params), member.metadata.num_prior_tokens
    return Trajectory(
        trajectory_id=member.trajectory_id,
        round_id=member.metadata.round,
        group_id=member.prompt.group_id,
        index=member.index,
        prompt_token_ids=member.prompt.token_ids,
        output_token_ids=token_ids,
        # Flat log-probs hold one entry a position: the sampled token's.
        logprobs=list(completion.logprobs.logprobs) if completion.logprobs is not None else [],
        source_mask=[MODEL_TOKEN] * len(token_ids),
        weight_versions=[
            VersionSpan(span.version, span.start, span.end)
            for span in completion.weight_versions or ()
            if span.end > span.start
        ],
        segments=[] if report is None else segments_of(report.segments, num_prior, len(token_ids)),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        text=completion.text or None,
        seed=member.seed,
        timings=_timings(report),
        tokens=_token_counts(report),
        metadata=member.prompt.metadata,
    )


def trajectory_at(member: MemberPlan, point: ForkPoint) -> Trajectory:
    """What a trajectory that runs had when it was forked: what is known here, then what the scheduler says of it."""
    start = point.start
    sampled = Trajectory(
        trajectory_id=member.trajectory_id,
        round_id=member.metadata.round,
        group_id=member.prompt.group_id,
        index=member.index,
        prompt_token_ids=member.prompt.token_ids,
        output_token_ids=point.token_ids,
        logprobs=point.logprobs,
        source_mask=[MODEL_TOKEN] * len(point.token_ids),
        weight_versions=[VersionSpan(version, first - start, end - start) for version, first, end in point.versions],
        segments=segments_of(point.segments, start, len(point.token_ids)),
        finish_reason="abort",
        seed=member.seed,
        timings=Timings(submitted_s=0.0),
        tokens=TokenCounts(),
        metadata=member.prompt.metadata,
    )
    return sampled if member.prior is None else joined(member.prior, sampled)


def _timings(report: MemberReport | None) -> Timings:
    if report is None:
        return Timings(submitted_s=0.0)

    def since_opened(moment: float | None) -> float | None:
        return None if moment is None else moment - report.opened_ts

    return Timings(
        submitted_s=report.arrived_ts - report.opened_ts,
        scheduled_s=since_opened(report.scheduled_ts),
        first_token_s=since_opened(report.first_token_ts),
        finished_s=since_opened(report.finished_ts),
    )


def _token_counts(report: MemberReport | None) -> TokenCounts:
    if report is None:
        return TokenCounts()
    return TokenCounts(
        scheduled=report.num_scheduled_tokens,
        recomputed=report.num_recomputed_tokens,
        cached=report.num_cached_tokens,
        parked=report.num_parked_tokens,
        preemptions=report.num_preemptions,
    )
