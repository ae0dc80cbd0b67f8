"""Forks of trajectories in one round that carries over: of those that run, and of those that were stopped or ended."""

from __future__ import annotations

from collections.abc import Sequence

from longtail.engine.carry_round import CarryRound
from longtail.engine.driver import EngineDriver
from longtail.engine.errors import InvalidInputError
from longtail.engine.forks import Fork, ask_scheduler, check_fork, check_position
from longtail.engine.group_state import GroupState
from longtail.engine.rounds import MemberPlan
from longtail.engine.segments import trajectory_at
from longtail.engine.trajectory_parts import branches
from longtail.engine.waves import Waves
from longtail.scheduler.fork_order import ForkOrder
from longtail.scheduler.metadata import RolloutMetadata


class CarryForks:
    """See the module. In the thread of the round's caller, one fork of a group at a time."""

    def __init__(self, driver: EngineDriver, round_: CarryRound, waves: Waves) -> None:
        self._driver = driver
        self._waves = waves
        self._round = round_

    def ask(self, trajectory_id: str, at: int | None, n: int, seeds: Sequence[int] | None) -> Fork | None:
        """Ask the scheduler; its group waits for `end` before it is complete, or runs.

        `None` while another fork of the group is not taken: take the next item, and try again.

        Raises:
            InvalidInputError: an argument is wrong, or the group is complete.

        """
        group, index = self._find(trajectory_id)
        if self._round.is_forking(group.serial):
            return None
        order = self._order(group, index, at, n, seeds, place=self._round.place_of(group.serial, index))
        indices = range(len(group.members), len(group.members) + n)
        fork = Fork(trajectory_id, indices, seeds, order, ask_scheduler(self._driver, order))
        self._round.hold(group.serial)
        return fork

    def take(self, fork: Fork) -> tuple[list[str], list[MemberPlan]] | None:
        """Once it is answered: ids of the branches, and what to submit; `None` as `RoundRun.take_fork` has it.

        Raises:
            InvalidInputError: the scheduler refused, or the group began again meanwhile.

        """
        group, index = self._find(fork.trajectory_id)
        running, order = self._running(group, index), fork.order
        try:
            point = fork.answer.result()
        except InvalidInputError as error:
            if not fork.was_late(error):
                raise
            # Its wave was cut, or it ended, in a step whose outputs were not taken.
            if running is None:
                fork.order = self._order(group, index, order.at, len(fork.indices), fork.seeds, place=None)
                fork.answer = ask_scheduler(self._driver, fork.order)
            return None
        if running is not None and not point.is_live:
            return None
        parent = group.members[index] if running is None else trajectory_at(running, point)
        assert parent is not None
        # It may have had fewer tokens than that when it was stopped.
        check_position(point.at, max_tokens=group.budget(index), ended=parent if running is None else None)
        ids = {one: group.trajectory_id(one) for one in fork.indices}
        members = branches(parent, point.at, ids, fork.seeds_after(group.seed_of(index)))
        plans = self._round.branch(group, parent, members, order, point.index, submit=self._waves.is_open)
        fork.is_taken = True
        return list(ids.values()), plans

    def end(self, fork: Fork) -> None:
        """It was taken, or is given up."""
        serial = _serial_of(fork.trajectory_id)
        assert serial is not None
        self._round.release(serial)
        fork.give_up(self._driver)

    def _order(
        self,
        group: GroupState,
        index: int,
        at: int | None,
        n: int,
        seeds: Sequence[int] | None,
        *,
        place: RolloutMetadata | None,
    ) -> ForkOrder:
        running, member = self._running(group, index), group.members[index]
        ended = member if running is None else None
        if running is None and member is None:
            raise InvalidInputError("trajectory_id", "a trajectory that has begun", group.trajectory_id(index))
        if ended is not None and at is None and not ended.ended_by_itself:
            at = len(ended.output_token_ids)
        check_fork(at, n, seeds, max_tokens=group.budget(index), ended=ended)
        return ForkOrder(
            of=group.park_key(index),
            keys=[group.park_key(len(group.members) + place) for place in range(n)],
            at=at,
            num_prompt_tokens=len(group.prompt.token_ids),
            round=None if place is None else place.round,
            group=None if place is None else place.group,
        )

    def _find(self, trajectory_id: str) -> tuple[GroupState, int]:
        serial = _serial_of(trajectory_id)
        index = trajectory_id.rpartition("/")[2]
        if serial is not None and index.isdecimal() and self._round.may_branch(serial):
            group, place = self._round.store.carried[serial], int(index)
            if group.sampling.tree is not None:
                what = "a trajectory that is not of a tree, which grows by itself"
                raise InvalidInputError("trajectory_id", what, trajectory_id)
            if place < len(group.members) and group.trajectory_id(place) == trajectory_id:
                return group, place
        raise InvalidInputError("trajectory_id", "a trajectory of a group that is not complete", trajectory_id)

    def _running(self, group: GroupState, index: int) -> MemberPlan | None:
        return next((plan for plan in self._round.running_members(group.serial) if plan.index == index), None)


def _serial_of(trajectory_id: str) -> int | None:
    """Of the group, in `<round>/<serial>.<restarts>/<index>`."""
    parts = trajectory_id.rsplit("/", 2)
    serial = parts[1].partition(".")[0] if len(parts) == 3 else ""
    return int(serial) if serial.isdecimal() else None
