"""One group from its submission to its end, over any number of rounds.

All of it is plain data, so that a journal can hold it: prompt, sampling, and for every member what it has so far. A
member that was cut is a `Trajectory` like any other, with `finish_reason="abort"`; going on with it adds a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from longtail.engine.config import SamplingConfig
from longtail.engine.prompts import TokenPrompt
from longtail.engine.rounds import MemberPlan, budget_of
from longtail.engine.trajectory import Branch, Group, Trajectory
from longtail.engine.trajectory_parts import num_computed_before
from longtail.engine.tree_members import places, tree_seed
from longtail.scheduler.admission import Candidate
from longtail.scheduler.boundaries import BoundarySpec
from longtail.scheduler.metadata import RolloutMetadata
from longtail.scheduler.staleness import Span
from longtail.scheduler.tree_place import TreePlace


@dataclass(frozen=True, slots=True)
class RunPolicy:
    """How members run in one wave; the fields are those of `RolloutMetadata`, `park` whether KV is parked."""

    wave_id: str
    target_groups: int
    kv_policy: str
    park: bool
    can_fork: bool = False
    has_boundaries: bool = False


class GroupState(msgspec.Struct, kw_only=True):
    """A submitted group.

    Attributes:
        serial: place in the order of submission, unique in its store.
        round_no: number of the round that its first tokens are of: it began, or began again, in it.
        round_id: id of the round that it first began in.
        seed: of its first member; the others count up. `None` draws from the engine's stream.
        members: what each member has, by index; `None` for one that has not run. Branches come after the first
            `group_size` members.
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
        """Every member ended by itself, but for those that a tree had no branch for."""
        return not self.unfinished

    @property
    def unfinished(self) -> list[int]:
        """Indices of the members that have to go on."""
        members = enumerate(self.members)
        return [i for i, one in members if one is None or not (one.ended_by_itself or one.was_dismissed)]

    def num_tokens(self, index: int) -> int:
        """Output tokens that a member has."""
        member = self.members[index]
        return 0 if member is None else len(member.output_token_ids)

    def budget(self, index: int) -> int:
        """Output tokens that a member may have in all; a branch has the budget of the member that it left."""
        while self.sampling.tree is None and (branch := self._branch(index)) is not None:
            index = branch.of
        return budget_of(self.sampling, self.prompt, index)

    def seed_of(self, index: int) -> int | None:
        """A member's sampling seed."""
        member = self.members[index]
        if member is not None and member.branch is not None:
            return member.seed
        return None if self.seed is None else self.seed + index

    def num_drawn(self, index: int) -> int:
        """Output tokens that a member has drawn with that seed."""
        member, branch = self.members[index], self._branch(index)
        return 0 if member is None else sum(member.source_mask[0 if branch is None else branch.at :])

    @property
    def paused(self) -> list[int]:
        """Indices of the members that are at a boundary."""
        return [i for i, member in enumerate(self.members) if member is not None and member.is_paused]

    def _boundary(self, index: int) -> BoundarySpec | None:
        member, sampling = self.members[index], self.sampling
        if not sampling.has_boundaries:
            return None
        return BoundarySpec(
            every=sampling.boundary_every,
            token_ids=sampling.boundary_token_ids,
            strings=sampling.boundary_strings,
            start=0 if member is None else member.segment_start,
        )

    def _branch(self, index: int) -> Branch | None:
        member = self.members[index]
        return None if member is None else member.branch

    def park_key(self, index: int) -> str:
        """Key of a member's parked KV; another one after a restart."""
        return f"{self.serial}.{self.num_restarts}.{index}"

    def park_keys(self) -> list[str]:
        """Keys of all members."""
        return [self.park_key(index) for index in range(len(self.members))]

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

    def add_branches(self, parent: Trajectory, members: Sequence[Trajectory]) -> None:
        """Members join that have left `parent`, of which this may be less than is known, or more."""
        if len(parent.output_token_ids) > self.num_tokens(parent.index):
            self.members[parent.index] = parent
            self.num_computed[parent.index] = len(self.prompt.token_ids) + len(parent.output_token_ids) - 1
        self.members.extend(members)
        self.num_computed.extend(map(num_computed_before, members))

    def restart(self, round_no: int) -> None:
        """Forget every token, and branches with them; it is as young as a fresh group of round `round_no`."""
        self.round_no = round_no
        self.members = [None] * self.group_size
        self.num_computed = [0] * self.group_size
        self.num_restarts += 1
        self.metadata = None

    @property
    def attempt(self) -> str:
        """What ids call the group: another one after a restart, as a wave may still know the old one."""
        return f"{self.serial}.{self.num_restarts}"

    def trajectory_id(self, index: int) -> str:
        """Of a member."""
        return f"{self.round_id}/{self.attempt}/{index}"

    def request_id(self, wave_id: str, index: int) -> str:
        """Of a member that runs in a wave."""
        return f"{wave_id}/{self.attempt}/{index}"

    def plans(self, run: RunPolicy, name: str, indices: Sequence[int]) -> list[MemberPlan]:
        """What to submit so that these members, all of which have budget left, go on as a group of the scheduler."""
        tree: dict[int, TreePlace] = {}
        if self.sampling.tree is not None:
            seed = tree_seed(self.seed, f"{self.round_id}/{self.attempt}")
            tree = places(self.sampling.tree, seed, self.members, self.park_keys())
        return [
            self.plan(run, index, name, place, len(indices), tree.get(index)) for place, index in enumerate(indices)
        ]

    def plan(
        self, run: RunPolicy, index: int, name: str, place: int, num_places: int, tree: TreePlace | None = None
    ) -> MemberPlan:
        """What to submit so that a member goes on, which is at `place` of so many in the scheduler's group `name`."""
        num_tokens, is_tree = self.num_tokens(index), tree is not None
        return MemberPlan(
            request_id=self.request_id(run.wave_id, index),
            prompt=self.prompt,
            sampling=self.sampling,
            metadata=RolloutMetadata(
                round=run.wave_id,
                target_groups=run.target_groups,
                group=name,
                group_size=num_places,
                index=place,
                park=self.park_key(index) if run.park or is_tree else None,
                kv_policy=run.kv_policy,
                num_prior_tokens=num_tokens,
                num_computed_tokens=self.num_computed[index],
                num_drawn_tokens=self.num_drawn(index) if num_tokens else None,
                stop=self.sampling.stop if num_tokens or is_tree or self.sampling.stop_at_boxed else (),
                stop_at_boxed=self.sampling.stop_at_boxed,
                boundary=self._boundary(index) if run.has_boundaries else None,
                can_fork=run.can_fork and not is_tree,
                tree=tree,
            ),
            seed=self.seed_of(index),
            max_tokens=self.budget(index),
            trajectory_id=self.trajectory_id(index),
            index=index,
            prior=self.members[index],
        )

    def group(self, round_id: str, rejected: str | None = None) -> Group:
        """The group as a caller gets it, returned in `round_id`."""
        return Group(
            group_id=self.prompt.group_id,
            trajectories=[
                msgspec.structs.replace(member, round_id=round_id)
                for member in self.members
                if member is not None and not member.was_dismissed
            ],
            num_dismissed=sum(member is not None and member.was_dismissed for member in self.members),
            complete=self.is_complete,
            metadata=self.prompt.metadata if self.metadata is None else self.metadata,
            rejected=rejected,
        )


def token_spans(trajectory: Trajectory) -> list[Span]:
    """`(version, start, end)` of a trajectory's tokens, versions as numbers."""
    return [(int(span.version), span.start, span.end) for span in trajectory.weight_versions]
