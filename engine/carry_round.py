"""One round over a `GroupStore`, as a state machine without threads, clocks or an engine.

It says whom to submit and whom to stop, takes what ended, and decides what becomes of each group: carried, banked,
returned, restarted or filtered. `carry_run.py` connects it to an engine and to hooks; the tests drive it with a real
scheduler and a faked model.

A *wave* is one round of the scheduler: the members that are submitted together, cut together in the step in which
enough groups are complete. A round has one wave, unless groups that the scheduler counted are refused afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import msgspec

from longtail.engine.carry_config import CarryConfig
from longtail.engine.carry_stats import Tally, masked_group
from longtail.engine.group_state import GroupState, RunPolicy
from longtail.engine.group_store import GroupStore
from longtail.engine.rounds import MemberPlan
from longtail.engine.trajectory import CarryStats, Group, Trajectory
from longtail.engine.trajectory_parts import joined, paused_at
from longtail.engine.tree_members import born
from longtail.scheduler.admission import AdmissionPolicy
from longtail.scheduler.fork_order import ForkOrder
from longtail.scheduler.limits import MAX_TARGET_GROUPS
from longtail.scheduler.metadata import RolloutMetadata
from longtail.scheduler.staleness import GroupFate
from longtail.scheduler.tree_place import BirthReport


class CarryRound:
    """See the module.

    Args:
        store: holds every group; a round of it is open until `close`.
        round_id: of this round.
        target_groups: how many groups it returns; `None` for a stream without an end.
        config: policies.
        version: of the weights.
        is_judged: hooks decide whether a complete group is accepted, so that the scheduler must not count.
        max_model_len: of the engine, in tokens; a trajectory of this length ends as `length`.
        can_fork: members that run may be forked.
        has_boundaries: members stop at their boundaries.

    Attributes:
        filtered: groups refused in this round; a stream without an end only counts them.
        unpark: keys of KV that nobody will take up again.
        abort: requests whose groups begin again or are gone. Who runs the round tells the engine, and empties both.
        paused: members of groups in the wave that are at a boundary, by serial and index, as they were submitted.

    """

    def __init__(
        self,
        store: GroupStore,
        *,
        round_id: str,
        target_groups: int | None,
        config: CarryConfig,
        version: int,
        is_judged: bool,
        max_model_len: int | None = None,
        can_fork: bool = False,
        has_boundaries: bool = False,
    ) -> None:
        self.store = store
        self.round_id = round_id
        self.target_groups = target_groups
        self.version = version
        self.filtered: list[Group] = []
        self.unpark: list[str] = []
        self.abort: list[str] = []
        self.paused: dict[tuple[int, int], MemberPlan] = {}
        self._config = config
        self._bound = config.bound
        self._admission = AdmissionPolicy(config.admission)
        self._is_judged = is_judged
        self._max_model_len = max_model_len
        self._can_fork = can_fork
        self._has_boundaries = has_boundaries
        self._tally = Tally(len(store.carried), len(store.banked))
        self.round_no = store.begin_round()
        #: Members in the engine, by request id.
        self._running: dict[str, tuple[MemberPlan, int]] = {}
        self._active: Counter[int] = Counter()
        self._num_starts: Counter[tuple[str, int]] = Counter()
        #: Complete groups that the hooks have, or are to get.
        self._judging: set[int] = set()
        #: Groups that branches are about to join.
        self._forking: set[int] = set()
        #: Groups that may have become complete.
        self._changed = set(store.carried)
        self._num_waves = 0
        self._wave_id = round_id
        self._wave_targets = {round_id: MAX_TARGET_GROUPS}
        for group in list(store.groups()):
            self._check_age(group)

    # ---- what there is to do -----------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Members in the engine."""
        return len(self._running)

    @property
    def num_ready(self) -> int:
        """Complete and accepted groups."""
        return len(self.store.banked)

    @property
    def is_full(self) -> bool:
        """The round has its target."""
        return self.target_groups is not None and self.num_ready >= self.target_groups

    @property
    def num_judging(self) -> int:
        """Complete groups whose verdict is not there."""
        return len(self._judging)

    @property
    def num_in_play(self) -> int:
        """Groups that run, are complete, or wait for a verdict."""
        return self.num_ready + len(self._active.keys() | self._paused_groups) + len(self._judging)

    @property
    def _paused_groups(self) -> set[int]:
        return {serial for serial, _ in self.paused}

    def add_fresh(self, groups: Sequence[GroupState], cursor: int) -> None:
        """Take fresh groups in."""
        if groups:
            self.store.submit(groups, cursor)
            self._tally.fresh += len(groups)

    def waiting(self) -> list[GroupState]:
        """Carried groups that do not run, first to admit first."""
        busy = self._judging | self._forking | self._paused_groups
        held = {
            serial: group
            for serial, group in self.store.carried.items()
            if not (self._active[serial] or serial in busy or group.is_complete)
        }
        candidates = self._admission.order(group.candidate(self.round_no) for group in held.values())
        return [held[candidate.serial] for candidate in candidates]

    def begin_wave(self) -> str:
        """Name a round of the scheduler; what `start` submits from now on belongs to it."""
        self._num_waves += 1
        self._wave_id = self.round_id if self._num_waves == 1 else f"{self.round_id}~{self._num_waves}"
        counts = self.target_groups is not None and not self._is_judged
        target = max(1, (self.target_groups or 0) - self.num_ready) if counts else MAX_TARGET_GROUPS
        self._wave_targets[self._wave_id] = target
        return self._wave_id

    def start(self, groups: Sequence[GroupState]) -> list[MemberPlan]:
        """Let waiting groups run in the current wave; returns the members to submit.

        A member that has no budget left ends as `length` here, without the engine. One that is at a boundary waits.
        """
        plans: list[MemberPlan] = []
        for group in groups:
            for index in group.unfinished:
                if self._is_spent(group, index):
                    self._end_without_budget(group, index)
            # Those of an earlier process may be at a boundary that nobody decides any more.
            waiting = group.paused if self._has_boundaries else []
            mine = group.plans(self._policy(self._wave_id), self._name(group, self._wave_id), group.unfinished)
            self.paused |= {(group.serial, plan.index): plan for plan in mine if plan.index in waiting}
            mine = [plan for plan in mine if plan.index not in waiting]
            self._tally.resumes += sum(plan.prior is not None and bool(plan.prior.output_token_ids) for plan in mine)
            self._enter(group.serial, mine)
            plans += mine
        return plans

    def _name(self, group: GroupState, wave_id: str) -> str:
        """What the scheduler calls a group that joins a wave: a part of it may be in it already."""
        self._num_starts[wave_id, group.serial] += 1
        number = self._num_starts[wave_id, group.serial]
        return group.attempt if number == 1 else f"{group.attempt}~{number}"

    def _policy(self, wave_id: str) -> RunPolicy:
        config = self._config
        return RunPolicy(
            wave_id, self._wave_targets[wave_id], config.kv_policy, config.park, self._can_fork, self._has_boundaries
        )

    def _enter(self, serial: int, plans: Sequence[MemberPlan]) -> None:
        for plan in plans:
            self._running[plan.request_id] = (plan, serial)
        if plans:
            self._active[serial] += len(plans)

    def requests(self) -> list[str]:
        """Ids of the running members."""
        return list(self._running)

    # ---- forks -------------------------------------------------------------------------------------------------

    def may_branch(self, serial: int) -> bool:
        """A group is not complete, and no hook has it."""
        group = self.store.carried.get(serial)
        return group is not None and serial not in self._judging and not group.is_complete

    def running_members(self, serial: int) -> Iterator[MemberPlan]:
        """Members of a group that run."""
        return (plan for plan, mine in self._running.values() if mine == serial)

    def place_of(self, serial: int, index: int) -> RolloutMetadata | None:
        """Where a group is in the scheduler: as this member was submitted, or any other of it that is in a wave."""
        paused = (plan for (mine, _), plan in self.paused.items() if mine == serial)
        plans = {plan.index: plan.metadata for plan in chain(paused, self.running_members(serial))}
        return plans.get(index) or next(iter(plans.values()), None)

    def is_forking(self, serial: int | None = None) -> bool:
        """Branches are about to join a group, or any."""
        return bool(self._forking) if serial is None else serial in self._forking

    def hold(self, serial: int) -> None:
        """Branches are about to join a group: it is not complete until `release`."""
        self._forking.add(serial)

    def release(self, serial: int) -> None:
        """See `hold`."""
        self._forking.discard(serial)
        self._changed.add(serial)

    def branch(
        self,
        group: GroupState,
        parent: Trajectory,
        members: Sequence[Trajectory],
        order: ForkOrder,
        first_place: int,
        *,
        submit: bool,
    ) -> list[MemberPlan]:
        """Branches of `parent` join a group, in the scheduler's from `first_place` on if that has reserved places.

        Returns:
            What to submit, if the group is in a wave that is not over.

        """
        indices = range(len(group.members), len(group.members) + len(members))
        self.store.branch(group.serial, parent, members)
        if order.round is not None and order.group is not None:
            policy, end = self._policy(order.round), first_place + len(members)
            plans = [
                group.plan(policy, index, order.group, first_place + place, end) for place, index in enumerate(indices)
            ]
        elif submit and (at := self.place_of(group.serial, parent.index)) is not None:
            plans = group.plans(self._policy(at.round), self._name(group, at.round), indices)
        else:
            return []
        self._enter(group.serial, plans)
        return plans

    # ---- what happened -----------------------------------------------------------------------------------------

    def running(self, request_id: str) -> tuple[MemberPlan, int] | None:
        """The running member of a request with its group's serial; `None` if it was given up meanwhile."""
        return self._running.get(request_id)

    def end(
        self, request_id: str, segment: Trajectory, num_computed: int, boundary: str | int | None = None
    ) -> Trajectory:
        """A running member got its final output, perhaps at a `boundary`; returns the whole trajectory.

        Its group may be complete then: see `complete`.
        """
        plan, serial = self._pop(request_id)
        whole = segment if plan.prior is None else joined(plan.prior, segment)
        self._tally.add(segment)
        if whole.is_paused:
            whole = paused_at(whole, boundary)
            self.paused[serial, plan.index] = plan
        elif not (whole.ended_by_itself or whole.was_cut or whole.was_dismissed):
            self.refuse(self.store.carried[serial], f"{whole.finish_reason}: {whole.stop_reason}")
            return whole
        self.store.end_member(serial, plan.index, whole, num_computed)
        self._changed.add(serial)
        return whole

    def be_born(self, request_id: str, birth: BirthReport) -> MemberPlan | int:
        """A running member turned out to be a branch of another one; returns its plan, or the other if that runs."""
        plan, serial = self._running[request_id]
        group = self.store.carried[serial]
        parent = group.members[birth.parent]
        if parent is None or group.request_id(plan.metadata.round, birth.parent) in self._running:
            return birth.parent
        plan = born(plan, birth, parent)
        self._running[request_id] = (plan, serial)
        return plan

    def end_unborn(self, request_id: str) -> None:
        """A running member of a tree was cut before it began: it is as if it had not run."""
        self._pop(request_id)

    def go_on(self, group: GroupState, plan: MemberPlan, member: Trajectory, *, submit: bool) -> list[MemberPlan]:
        """A member that was at a boundary goes on as `member`; returns what to submit, unless its wave is over."""
        self._put(group, plan.index, member)
        if not submit:
            return []
        at = plan.metadata
        again = group.plan(self._policy(at.round), plan.index, at.group, at.index, at.group_size)
        self._enter(group.serial, [again])
        return [again]

    def end_paused(self, group: GroupState, index: int, member: Trajectory) -> None:
        """A member that was at a boundary ends there as `member`."""
        self._put(group, index, member)
        self.unpark.append(group.park_key(index))
        self._changed.add(group.serial)

    def refuse(self, group: GroupState, reason: str) -> None:
        """A group is filtered while it runs."""
        self._filter(group, reason)
        self._give_up({group.serial})

    def _put(self, group: GroupState, index: int, member: Trajectory) -> None:
        self.store.end_member(group.serial, index, member, group.num_computed[index])

    def replace_member(self, serial: int, index: int, member: Trajectory) -> None:
        """A hook has changed a finished member."""
        group = self.store.carried.get(serial)
        if group is not None:
            self._put(group, index, member)

    def complete(self) -> list[GroupState]:
        """Groups that became complete, for the hooks where there are any; else they are banked.

        When the round begins: also those whose verdict an earlier round did not get.
        """
        changed, self._changed = self._changed, set()
        done = [
            self.store.carried[serial]
            for serial in sorted(changed & self.store.carried.keys())
            if serial not in self._judging | self._forking and self.store.carried[serial].is_complete
        ]
        self._judging.update(group.serial for group in done)
        if self._is_judged:
            return done
        for group in done:
            self.judge(group.serial, [member for member in group.members if member is not None])
        return []

    def judge(
        self,
        serial: int,
        members: Sequence[Trajectory],
        rejected: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """The verdict on a complete group; `members` and `metadata` are how the hooks left them."""
        self._judging.discard(serial)
        group = self.store.carried.get(serial)
        if group is None or not group.is_complete:
            return
        if rejected is not None:
            self._filter(group, rejected)
        elif self._check_age(group):
            # Hooks do not see those that never began.
            by_index = {one.index: one for one in (*group.members, *members) if one is not None}
            self.store.bank(serial, [by_index[index] for index in sorted(by_index)], metadata)

    def change_version(self, version: int) -> None:
        """The weights changed while the round runs."""
        self.version = version
        self._give_up({group.serial for group in list(self.store.groups()) if not self._check_age(group)})

    # ---- its end -----------------------------------------------------------------------------------------------

    def ready(self, limit: int | None = None) -> dict[int, Group]:
        """Banked groups as a caller gets them, first banked first, tokens beyond the bound masked."""
        return {
            serial: masked_group(group.group(self.round_id), self._bound, self.version)
            for serial, group in islice(self.store.banked.items(), limit)
        }

    def stats(self, returned: Sequence[Group]) -> CarryStats:
        """The numbers of the round when it returns these groups, which are still banked."""
        return self._tally.stats(self.store, returned, self._bound, self.version, num_judging=len(self._judging))

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled in this round."""
        return self._tally.output_tokens

    @property
    def num_scheduled_tokens(self) -> int:
        """Tokens that went through the model for members that ended or were cut in this round."""
        return self._tally.scheduled_tokens

    @property
    def filtered_reasons(self) -> dict[str, int]:
        """How many groups were refused, by reason."""
        return dict(self._tally.reasons)

    @property
    def num_preemptions(self) -> int:
        """How often a running member lost its KV to the pool."""
        return self._tally.preemptions

    # ---- parts -------------------------------------------------------------------------------------------------

    def _check_age(self, group: GroupState) -> bool:
        """Apply the staleness bound to a group; false if it restarts or is gone."""
        fate = self._bound.fate((version for version, _, _ in group.token_spans()), self.version)
        if fate is GroupFate.RESTART:
            self.unpark += group.park_keys()
            self._judging.discard(group.serial)
            self.store.restart(group.serial)
            self._tally.restarts += 1
        elif fate is GroupFate.DROP:
            self._filter(group, "stale")
        return fate is GroupFate.KEEP

    def _filter(self, group: GroupState, reason: str) -> None:
        self.unpark += group.park_keys()
        self._judging.discard(group.serial)
        if self.target_groups is not None:
            self.filtered.append(group.group(self.round_id, rejected=reason))
        self._tally.reasons[reason.split(":")[0]] += 1
        self.store.filter(group.serial, reason)

    def _is_spent(self, group: GroupState, index: int) -> bool:
        num_tokens = group.num_tokens(index)
        has_room = self._max_model_len is None or len(group.prompt.token_ids) + num_tokens < self._max_model_len
        return num_tokens > 0 and (num_tokens >= group.budget(index) or not has_room)

    def _end_without_budget(self, group: GroupState, index: int) -> None:
        member = group.members[index]
        assert member is not None
        ended = msgspec.structs.replace(member, finish_reason="length", stop_reason=None)
        self.store.end_member(group.serial, index, ended, group.num_computed[index])
        self._changed.add(group.serial)

    def _give_up(self, serials: set[int]) -> None:
        """Forget the running members of these groups."""
        requests = [request_id for request_id, (_, serial) in self._running.items() if serial in serials]
        for request_id in requests:
            del self._running[request_id]
        self.paused = {place: plan for place, plan in self.paused.items() if place[0] not in serials}
        for serial in serials:
            self._active.pop(serial, None)
        self.abort += requests

    def _pop(self, request_id: str) -> tuple[MemberPlan, int]:
        """A running member does not run any more."""
        plan, serial = self._running.pop(request_id)
        self._active[serial] -= 1
        if not self._active[serial]:
            del self._active[serial]
        return plan, serial
