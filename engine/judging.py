"""Takes finished trajectories and complete groups through the hooks, and brings what they say to who runs the round.

Hooks answer from threads of their own, at any time: also after the round in which their group became complete. Answers
are items that the current run takes from its queue; without a run they wait in the inbox for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from msgspec.structs import replace

from longtail.engine.group_state import GroupState
from longtail.engine.hook_points import Decision, HookPoints, Refused, Verdict
from longtail.engine.trajectory import Group, Trajectory

#: A group in one attempt: serial, number of restarts.
Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class HookAnswer:
    """The hooks have something to say of a group: ask `Judging.poll`. One that gets lost is no loss."""

    key: Key


@dataclass(slots=True)
class _Case:
    """What is known of one group."""

    asked: dict[int, Future[Trajectory]] = field(default_factory=dict)
    members: dict[int, Trajectory] = field(default_factory=dict)
    group: Group | None = None
    verdict: Future[Verdict] | None = None
    #: By index of the member and number of its boundaries.
    deciding: dict[tuple[int, int], Future[Decision | Refused]] = field(default_factory=dict)


class Inbox:
    """Hands items from any thread to the current run; without one they wait for the next."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._deliver: Callable[[Any], object] | None = None
        self._waiting: list[Any] = []

    def attach(self, deliver: Callable[[Any], object]) -> None:
        """From now on items go to `deliver`, first those that wait."""
        with self._lock:
            self._deliver = deliver
            waiting, self._waiting = self._waiting, []
            for item in waiting:
                self._hand_over(item)

    def detach(self) -> None:
        """From now on items wait."""
        with self._lock:
            self._deliver = None

    def post(self, item: Any) -> None:
        """Hand over one item."""
        with self._lock:
            self._hand_over(item)

    def post_to_run(self, item: Any) -> None:
        """Hand over an item that means nothing without a run."""
        with self._lock:
            if self._deliver is not None:
                self._hand_over(item)

    def _hand_over(self, item: Any) -> None:
        if self._deliver is not None:
            try:
                self._deliver(item)
            except RuntimeError:  # an event loop that is closed by now
                self._deliver = None
            else:
                return
        self._waiting.append(item)


class Judging:
    """See the module. Its methods run in the thread of the current run."""

    def __init__(self, hooks: HookPoints, inbox: Inbox) -> None:
        self._hooks = hooks
        self._inbox = inbox
        self._cases: dict[Key, _Case] = {}

    def see_member(self, group: GroupState, index: int) -> None:
        """A member ended by itself."""
        key = _key(group)
        case = self._cases.setdefault(key, _Case())
        member = group.members[index]
        assert member is not None
        if index not in case.asked:
            case.asked[index] = self._hooks.finish_trajectory(member)
            self._wake(case.asked[index], key)

    def see_boundary(self, group: GroupState, index: int) -> None:
        """A member is at a boundary; `poll_decisions` has what the hooks say."""
        key, member = _key(group), group.members[index]
        assert member is not None
        case, place = self._cases.setdefault(key, _Case()), (index, len(member.boundaries))
        if place not in case.deciding:
            case.deciding[place] = self._hooks.decide(member)
        # Also where the answer came while no run took answers.
        self._wake(case.deciding[place], key)

    def poll_decisions(self, group: GroupState) -> dict[int, Decision | Refused]:
        """What is decided of members that are at a boundary, by index.

        Raises:
            Exception: what a hook failed with that is to end the round; the next round asks that hook again.

        """
        case = self._cases.get(_key(group))
        decided: dict[int, Decision | Refused] = {}
        for (index, number), future in list(() if case is None else case.deciding.items()):
            if case is not None and future.done():
                del case.deciding[index, number]
                member = group.members[index]
                if member is not None and member.is_paused and len(member.boundaries) == number:
                    decided[index] = future.result()
        return decided

    def see_group(self, group: GroupState, round_id: str) -> None:
        """A group is complete. Members that ended before a crash are shown to the hooks (again) now."""
        for index, member in enumerate(group.members):
            if member is not None and member.ended_by_itself:
                self.see_member(group, index)
        self._cases[_key(group)].group = group.group(round_id)
        # What was answered while no run took answers is there already.
        self._inbox.post(HookAnswer(_key(group)))

    def poll(self, key: Key) -> tuple[dict[int, Trajectory], Verdict | None]:
        """What is new of a group: members as the hooks left them, and the verdict.

        Raises:
            Exception: what a hook failed with that is to end the round; the next round asks that hook again.

        """
        case = self._cases.get(key)
        if case is None:
            return {}, None
        new: dict[int, Trajectory] = {}
        for index, future in list(case.asked.items()):
            if index not in case.members and future.done():
                if future.exception() is not None:
                    del case.asked[index]
                new[index] = case.members[index] = future.result()
        if case.verdict is None and case.group is not None and len(case.members) == len(case.group.trajectories):
            members = [case.members[index] for index in sorted(case.members)]
            case.verdict = self._hooks.finish_group(replace(case.group, trajectories=members))
            self._wake(case.verdict, key)
        if case.verdict is None or not case.verdict.done():
            return new, None
        verdict, case.verdict = case.verdict, None
        if verdict.exception() is None:
            del self._cases[key]
        return new, verdict.result()

    def keep_only(self, groups: Iterable[GroupState]) -> None:
        """Forget every group but these: it began again, or is gone."""
        keys = {_key(group) for group in groups}
        self._cases = {key: case for key, case in self._cases.items() if key in keys}

    def _wake(self, future: Future[Any], key: Key) -> None:
        future.add_done_callback(lambda _: self._inbox.post(HookAnswer(key)))


def _key(group: GroupState) -> Key:
    return group.serial, group.num_restarts
