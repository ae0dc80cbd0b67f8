"""One round as the front end gets it back: final outputs become trajectories, groups and the `Round`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from longtail.engine.errors import InvalidInputError
from longtail.engine.prompts import Tokenizer
from longtail.engine.resumed_text import with_whole_text
from longtail.engine.rounds import MemberPlan, RoundPlan
from longtail.engine.segments import segment_of
from longtail.engine.trajectory import Group, Round, RoundStats, Trajectory
from longtail.engine.trajectory_parts import joined, num_computed_before
from longtail.engine.tree_members import Orphans, born
from longtail.scheduler.fork_order import ForkPoint
from longtail.scheduler.metadata import report_of

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


@dataclass(slots=True)
class RoundCollector:
    """Turns the final outputs of one round into trajectories, and those into the `Round`.

    Attributes:
        plan: the round.
        tokenizer: the engine's, if it has one.
        num_forking: forks that the scheduler was asked for: their branches are pending too.

    """

    plan: RoundPlan
    tokenizer: Tokenizer | None
    num_forking: int = 0
    _members: dict[str, MemberPlan] = field(init=False)
    _pending: dict[str, MemberPlan] = field(init=False)
    _done: dict[str, list[Trajectory]] = field(init=False)
    _orphans: Orphans[RequestOutput] = field(init=False)
    _num_dismissed: Counter[str] = field(init=False)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._pending = {member.request_id: member for member in self.plan.members()}
        self._members = dict(self._pending)
        self._done = {prompt.group_id: [] for prompt in self.plan.prompts}
        self._orphans, self._num_dismissed = Orphans(), Counter()
        self._started = time.monotonic()

    @property
    def num_pending(self) -> int:
        """Members without a final output."""
        return len(self._pending) + self.num_forking

    @property
    def request_ids(self) -> list[str]:
        """Of all members, which are their trajectories' ids too."""
        return list(self._members)

    def take(self, output: RequestOutput) -> list[Trajectory]:
        """The final output of a member; returns the trajectories that are whole now.

        That of a path of a tree waits for the trajectory that it left.
        """
        whole: list[Trajectory] = []
        left = [output]
        while left:
            output = left.pop()
            member = self._pending[output.request_id]
            if (trajectory := self._take_one(member, output)) is not None:
                whole.append(trajectory)
                left += self._orphans.of(member.prompt.group_id, member.index)
        return whole

    def _take_one(self, member: MemberPlan, output: RequestOutput) -> Trajectory | None:
        group, report = member.prompt.group_id, report_of(output.kv_transfer_params)
        if report is not None and report.birth is not None:
            parent = self._ended(group, report.birth.parent)
            if parent is None:
                self._orphans.wait(group, report.birth.parent, output)
                return None
            member = born(member, report.birth, parent)
        segment = with_whole_text(self.tokenizer, member, segment_of(member, output))
        del self._pending[output.request_id]
        trajectory = segment if member.prior is None else joined(member.prior, segment)
        if trajectory.was_dismissed:
            self._num_dismissed[group] += 1
            return None
        self._done[group].append(trajectory)
        return trajectory

    def _ended(self, group: str, index: int) -> Trajectory | None:
        return next((one for one in self._done[group] if one.index == index), None)

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
                num_dismissed=self._num_dismissed[prompt.group_id],
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
