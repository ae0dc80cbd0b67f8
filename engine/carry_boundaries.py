"""What becomes of members of a round that are at a boundary, once the hooks have decided."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from longtail.engine.carry_book import CarryBook
from longtail.engine.carry_forks import CarryForks
from longtail.engine.carry_round import CarryRound
from longtail.engine.driver import EngineDriver
from longtail.engine.errors import InvalidInputError
from longtail.engine.forks import Fork
from longtail.engine.group_state import GroupState
from longtail.engine.hook_points import Append, Decision, Refused, Stop
from longtail.engine.hook_points import Fork as ForkHere
from longtail.engine.rounds import MemberPlan
from longtail.engine.trajectory_parts import ended_at, going_on
from longtail.engine.waves import Waves

if TYPE_CHECKING:
    from longtail.engine.core_link import CoreLink


class CarryBoundaries:
    """See the module. In the thread of the round's caller.

    Args:
        driver: of the engine.
        round_: whose members they are.
        forks: of the same round.
        book: with the hooks. Its inbox gets a `None` when `go_on_forking` has something to do.
        waves: of the same round.

    """

    def __init__(
        self, driver: EngineDriver, round_: CarryRound, forks: CarryForks, book: CarryBook, waves: Waves
    ) -> None:
        assert book.judging is not None
        self._driver = driver
        self._judging = book.judging
        self._inbox = book.inbox
        self._waves = waves
        self._round = round_
        self._forks = forks
        self._limits = driver.engine.limits
        self._postponed: deque[tuple[GroupState, MemberPlan, ForkHere]] = deque()
        #: Forks that hooks have decided, and that the scheduler has not answered, by serial of the group.
        self._asked: dict[int, tuple[Fork, MemberPlan]] = {}

    def ask(self, group: GroupState, index: int) -> None:
        """A member is at a boundary; its hooks may have been asked already."""
        self._judging.see_boundary(group, index)

    def decide(self, group: GroupState) -> list[MemberPlan]:
        """Apply what the hooks say of members of a group, as far as it runs; returns what to submit."""
        plans: list[MemberPlan] = []
        if any(serial == group.serial for serial, _ in self._round.paused):
            for index, decision in self._judging.poll_decisions(group).items():
                if (group.serial, index) in self._round.paused:  # unless another decision has refused the group
                    plans += self._apply(group, index, decision)
        return plans

    def _apply(self, group: GroupState, index: int, decision: Decision | Refused) -> list[MemberPlan]:
        plan, member = self._round.paused[group.serial, index], group.members[index]
        assert member is not None
        match decision:
            case Refused(reason):
                self._round.refuse(group, reason)
                return []
            case Stop():
                return self._end(group, plan, "stop")
            case ForkHere():
                self._postponed.append((group, plan, decision))
                return self.go_on_forking()
            case Append(token_ids):
                if wrong := [one for one in token_ids if one >= self._limits.vocab_size]:
                    what = f"token ids below {self._limits.vocab_size}"
                    self._round.refuse(group, f"on_boundary: appended {wrong[0]}, expected {what}")
                    return []
                num_tokens = len(member.output_token_ids) + len(token_ids)
                has_room = len(group.prompt.token_ids) + num_tokens < self._limits.max_model_len
                if num_tokens >= group.budget(index) or not has_room:
                    return self._end(group, plan, "length")
                return self._go_on(group, plan, token_ids)
        return self._go_on(group, plan)

    def go_on_forking(self) -> list[MemberPlan]:
        """Take the forks that were answered, and ask for those that waited for them; returns what to submit."""
        plans: list[MemberPlan] = []
        for serial, (fork, plan) in list(self._asked.items()):
            if fork.answer.done():
                plans += self._take(serial, fork, plan)
        waiting, self._postponed = self._postponed, deque()
        for group, plan, decision in waiting:
            if (group.serial, plan.index) not in self._round.paused:
                continue
            try:
                asked = self._forks.ask(group.trajectory_id(plan.index), None, decision.k, None)
            except InvalidInputError as error:
                self._round.refuse(group, f"on_boundary: {error}")
                continue
            if asked is None:
                self._postponed.append((group, plan, decision))
            else:
                self._asked[group.serial] = asked, plan
                self._wake_when_answered(asked)
        return plans

    def _take(self, serial: int, fork: Fork, plan: MemberPlan) -> list[MemberPlan]:
        """Take a fork that was answered, unless its group began again, or is gone."""
        group, answer = self._round.store.carried.get(serial), fork.answer
        taken = None
        if group is not None and (serial, plan.index) in self._round.paused:
            try:
                taken = self._forks.take(fork)
            except InvalidInputError as error:
                self._round.refuse(group, f"on_boundary: {error}")
            else:
                if taken is None:
                    if fork.answer is not answer:  # the scheduler was asked again
                        self._wake_when_answered(fork)
                    return []
        del self._asked[serial]
        self._forks.end(fork)
        return [] if group is None or taken is None else [*taken[1], *self._go_on(group, plan)]

    def close(self) -> None:
        """The round is over: forks that were not taken are given up."""
        for fork, _ in self._asked.values():
            fork.give_up(self._driver)
        self._asked.clear()

    def _go_on(self, group: GroupState, plan: MemberPlan, appended: Any = ()) -> list[MemberPlan]:
        member = group.members[plan.index]
        assert member is not None
        del self._round.paused[group.serial, plan.index]
        member = going_on(member, self._round.version, appended)
        return self._round.go_on(group, plan, member, submit=self._waves.is_open)

    def _end(self, group: GroupState, plan: MemberPlan, finish_reason: Any) -> list[MemberPlan]:
        member, at = group.members[plan.index], plan.metadata
        assert member is not None
        del self._round.paused[group.serial, plan.index]
        self._round.end_paused(group, plan.index, ended_at(member, finish_reason))

        def tell(link: CoreLink) -> None:
            link.rpc("finish_paused", round=at.round, group=at.group, index=at.index)

        self._driver.call_later(tell)
        if group.serial in self._round.store.carried:
            self._judging.see_member(group, plan.index)
        return []

    def _wake_when_answered(self, fork: Fork) -> None:
        fork.answer.add_done_callback(lambda _: self._inbox.post_to_run(None))
