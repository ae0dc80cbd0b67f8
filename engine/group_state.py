"""One group from its submission to its end, over any number of rounds.

All of it is plain data, so that a journal can hold it: prompt, sampling, and for every member what it has so far. A
member that was cut is a `Trajectory` like any other, with `finish_reason="abort"`; going on with it adds a segment.
"""

from __future__ import annotations

from typing import Any

import msgspec

from longtail.engine.config import SamplingConfig
from longtail.engine.prompts import TokenPrompt
from longtail.engine.rounds import MemberPlan
from longtail.engine.trajectory import Group, Segment, TokenCounts, Trajectory, VersionSpan
from longtail.scheduler.admission import Candidate
from longtail.scheduler.metadata import RolloutMetadata
from longtail.scheduler.staleness import Span


class GroupState(msgspec.Struct, kw_only=True):
    """A submitted group.

    Attributes:
        serial: place in the order of submission, unique in its store.
        round_no: number of the round that its first tokens are of: it began, or began again, in it.
        round_id: id of the round that it first began in.
        seed: of its first member; the others count up. `None` draws from the engine's stream.
        members: what each member has, by index; `None` for one that has not run.
        num_computed: by index, for how many tokens there was KV when the member was stopped.
        num_restarts: how often it began again from the prompt.
        metadata: what a hook made of the prompt's; `None` leaves it.

    """

    serial: int
    round_no: int
    round_id: str
    prompt: TokenPrompt
    group_size: int
    sampling: SamplingConfig
    seed: int | None
    members: list[Trajectory | None]
    num_computed: list[int]
    num_restarts: int = 0
    metadata: dict[str, Any] | None = None

    @staticmethod
    def new(
        serial: int, round_no: int, round_id: str, prompt: TokenPrompt, group_size: int, sampling: SamplingConfig
    ) -> GroupState:
        """A fresh group; its seed is the prompt's own, or the sampling's counted up by serial."""
        seed = prompt.seed
        if seed is None and sampling.seed is not None:
            seed = sampling.seed + serial * group_size
        return GroupState(
            serial=serial,
            round_no=round_no,
            round_id=round_id,
            prompt=prompt,
            group_size=group_size,
            sampling=sampling,
            seed=seed,
            members=[None] * group_size,
            num_computed=[0] * group_size,
        )

    @property
    def is_complete(self) -> bool:
        """Every member ended by itself."""
        return all(member is not None and member.ended_by_itself for member in self.members)

    @property
    def unfinished(self) -> list[int]:
        """Indices of the members that have to go on."""
        return [i for i, member in enumerate(self.members) if member is None or not member.ended_by_itself]

    def num_tokens(self, index: int) -> int:
        """Output tokens that a member has."""
        member = self.members[index]
        return 0 if member is None else len(member.output_token_ids)

    def budget(self, index: int) -> int:
        """Output tokens that a member may have in all."""
        return self.sampling.max_tokens if self.prompt.max_tokens is None else self.prompt.max_tokens[index]

    def park_key(self, index: int) -> str:
        """Key of a member's parked KV; another one after a restart."""
        return f"{self.serial}.{self.num_restarts}.{index}"

    def park_keys(self) -> list[str]:
        """Keys of all members."""
        return [self.park_key(index) for index in range(self.group_size)]

    def token_spans(self) -> list[Span]:
        """`(version, start, end)` of all tokens of all members."""
        return [span for member in self.members if member is not None for span in token_spans(member)]

    def candidate(self, round_no: int) -> Candidate:
        """The group as the admission policy sees it in round `round_no`."""
        unfinished = self.unfinished
        return Candidate(
            serial=self.serial,
            age_rounds=round_no - self.round_no,
            num_members_left=len(unfinished),
            num_tokens_left=sum(self.budget(index) - self.num_tokens(index) for index in unfinished),
        )

    def restart(self, round_no: int) -> None:
        """Forget every token; it is as young as a fresh group of round `round_no`."""
        self.round_no = round_no
        self.members = [None] * self.group_size
        self.num_computed = [0] * self.group_size
        self.num_restarts += 1
        self.metadata = None

    def plans(self, wave_id: str, target_groups: int, *, kv_policy: str, park: bool) -> list[MemberPlan]:
        """What to submit so that the unfinished members, all of which have budget left, go on."""
        going_on = self.unfinished
        # Another group for the scheduler after a restart: the wave may still know the old one.
        attempt = f"{self.serial}.{self.num_restarts}"
        return [
            MemberPlan(
                request_id=f"{wave_id}/{attempt}/{index}",
                prompt=self.prompt,
                sampling=self.sampling,
                metadata=RolloutMetadata(
                    round=wave_id,
                    target_groups=target_groups,
                    group=attempt,
                    group_size=len(going_on),
                    index=place,
                    park=self.park_key(index) if park else None,
                    kv_policy=kv_policy,
                    num_prior_tokens=self.num_tokens(index),
                    num_computed_tokens=self.num_computed[index],
                    stop=self.sampling.stop if self.num_tokens(index) else (),
                ),
                seed=None if self.seed is None else self.seed + index,
                max_tokens=self.budget(index) - self.num_tokens(index),
                trajectory_id=f"{self.round_id}/{attempt}/{index}",
                index=index,
                prior=self.members[index],
            )
            for place, index in enumerate(going_on)
        ]

    def group(self, round_id: str, rejected: str | None = None) -> Group:
        """The group as a caller gets it, returned in `round_id`."""
        return Group(
            group_id=self.prompt.group_id,
            trajectories=[
                msgspec.structs.replace(member, round_id=round_id) for member in self.members if member is not None
            ],
            complete=self.is_complete,
            metadata=self.prompt.metadata if self.metadata is None else self.metadata,
            rejected=rejected,
        )


def token_spans(trajectory: Trajectory) -> list[Span]:
    """`(version, start, end)` of a trajectory's tokens, versions as numbers."""
    return [(int(span.version), span.start, span.end) for span in trajectory.weight_versions]


def joined(prior: Trajectory, last: Trajectory) -> Trajectory:
    """`prior` with the segments of `last`, which went on from its tokens.

    The end is that of `last`, and so are its times; token counts add up.
    """
    offset = len(prior.output_token_ids)
    versions = list(prior.weight_versions)
    for span in last.weight_versions:
        moved = VersionSpan(span.version, span.start + offset, span.end + offset)
        if versions and versions[-1].version == moved.version:
            moved = VersionSpan(moved.version, versions.pop().start, moved.end)
        versions.append(moved)
    segments = [Segment(start=s.start + offset, end=s.end + offset, kv_versions=s.kv_versions) for s in last.segments]
    counts = {name: getattr(prior.tokens, name) + getattr(last.tokens, name) for name in TokenCounts.__struct_fields__}
    return msgspec.structs.replace(
        last,
        output_token_ids=prior.output_token_ids + last.output_token_ids,
        logprobs=prior.logprobs + last.logprobs,
        source_mask=prior.source_mask + last.source_mask,
        loss_mask=prior.loss_mask + last.loss_mask,
        weight_versions=versions,
        segments=[*prior.segments, *segments],
        tokens=TokenCounts(**counts),
    )
