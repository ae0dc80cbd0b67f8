"""When is a round complete, and who is in it: the book-keeping of rounds, groups and members.

A round is cut when `target_groups` of its groups are complete, and a group is complete when all its members
finished by themselves. This module only keeps the books and says what to do; it knows no vLLM, no clock and
no tokens. `rollout_scheduler.py` asks it on every arrival and after every step, and does what it says.

Invariants: a request id is live in at most one round; a closed round has no live member; the number of rounds
kept without a live member is bounded, so a client that never closes a round costs nothing in the long run.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.limits import MAX_GROUP_SIZE
from longtail.scheduler.metadata import RolloutMetadata

MAX_IDLE_ROUNDS = 1024
"""Rounds without a live member that are remembered, so that a late member still gets the right answer."""


class Admission(Enum):
    """What to do with an arriving member."""

    ADMIT = "admit"
    LATE = "late"
    """Its round is over: answer at once as a cut member with no tokens."""


@dataclass(slots=True)
class _Group:
    """`declared_size` is what its members say of it, `size` counts branches too, from `next_place` on come new ones.

    `reserved` are places of branches that have not arrived, `paused` of members that stopped at a boundary; `kept` are
    park keys of finished members that may be forked.
    """

    declared_size: int
    size: int
    next_place: int
    live: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)
    reserved: set[int] = field(default_factory=set)
    paused: set[int] = field(default_factory=set)
    kept: list[str] = field(default_factory=list)
    num_output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RoundCounts:
    """A round in numbers; see `longtail.engine.trajectory.RoundStats` for the meanings."""

    target_groups: int
    closed: bool
    num_groups: int
    num_complete_groups: int
    num_live_members: int
    num_cut_members: int
    num_kept_tokens: int
    num_steps: int
    idle_slot_steps: int
    peak_running: int
    peak_kv_usage: float


@dataclass(slots=True)
class RoundTotals:
    """What all rounds of this engine add up to since it started; every field only grows.

    Attributes:
        rounds: rounds opened; `cuts` of them ended because they reached their target.
        cut_members: members stopped at the end of a round, and members that came after it.
        kept_tokens: output tokens of complete groups.
        steps: engine steps with a live round; `idle_slot_steps` sums the batch slots that had been in use at the
            peak of the round and were empty in a later step.

    """

    rounds: int = 0
    cuts: int = 0
    complete_groups: int = 0
    cut_members: int = 0
    kept_tokens: int = 0
    steps: int = 0
    idle_slot_steps: int = 0


@dataclass(slots=True)
class _Round:
    target_groups: int
    opened_ts: float
    groups: dict[str, _Group] = field(default_factory=dict)
    live: dict[str, RolloutMetadata] = field(default_factory=dict)
    num_complete_groups: int = 0
    num_cut_members: int = 0
    num_kept_tokens: int = 0
    closed: bool = False
    num_steps: int = 0
    idle_slot_steps: int = 0
    peak_running: int = 0
    peak_kv_usage: float = 0.0

    def counts(self) -> RoundCounts:
        return RoundCounts(
            target_groups=self.target_groups,
            closed=self.closed,
            num_groups=len(self.groups),
            num_complete_groups=self.num_complete_groups,
            num_live_members=len(self.live),
            num_cut_members=self.num_cut_members,
            num_kept_tokens=self.num_kept_tokens,
            num_steps=self.num_steps,
            idle_slot_steps=self.idle_slot_steps,
            peak_running=self.peak_running,
            peak_kv_usage=self.peak_kv_usage,
        )


class RoundBook:
    """The rounds of one engine.

    Args:
        max_idle_rounds: how many rounds without a live member are remembered, oldest forgotten first. A member
            that names a forgotten round opens it anew.

    """

    def __init__(self, max_idle_rounds: int = MAX_IDLE_ROUNDS) -> None:
        self._max_idle_rounds = max_idle_rounds
        self._live: dict[str, _Round] = {}
        self._idle: OrderedDict[str, _Round] = OrderedDict()
        self._round_of: dict[str, str] = {}
        self.totals = RoundTotals()
        self._ready: list[tuple[str, _Round]] = []

    def admit(self, request_id: str, metadata: RolloutMetadata, now: float) -> Admission:
        """Enter a member that arrives at `now` (seconds, any clock).

        Raises:
            InvalidInputError: it contradicts its round or group, or its place in the group is taken. The books
                are unchanged.

        """
        assert request_id not in self._round_of, f"{request_id} is a live member already"
        entry = self._find(metadata.round)
        if entry is not None:
            _check_consistent(entry, metadata)
            if entry.closed:
                self._count_cut(entry, 1)
                return Admission.LATE
        else:
            entry = _Round(metadata.target_groups, opened_ts=now)
            self.totals.rounds += 1
        group = entry.groups.get(metadata.group)
        if group is None:
            group = entry.groups[metadata.group] = _Group(
                metadata.group_size, size=metadata.group_size, next_place=metadata.group_size
            )
        self._idle.pop(metadata.round, None)
        self._live[metadata.round] = entry
        group.live.add(metadata.index)
        group.reserved.discard(metadata.index)
        group.paused.discard(metadata.index)
        entry.live[request_id] = metadata
        self._round_of[request_id] = metadata.round
        return Admission.ADMIT

    def knows_group(self, round_id: str, group_id: str) -> bool:
        """Whether a group of a round that is not over has, or had, members."""
        entry = self._find(round_id)
        return entry is not None and not entry.closed and group_id in entry.groups

    def reserve(self, round_id: str, group_id: str, count: int) -> int:
        """Make room for `count` more members in a group, which is not complete before they finished.

        Returns:
            The place of the first; the others follow.

        Raises:
            InvalidInputError: no such round or group, its round is over, it is complete, or it would be too large.

        """
        entry = self._known(round_id)
        if entry.closed:
            raise InvalidInputError("round", "a round that is not over", round_id)
        group = entry.groups.get(group_id)
        if group is None or len(group.finished) == group.size:
            raise InvalidInputError("group", f"a group of round {round_id!r} that is not complete", group_id)
        if group.next_place + count > MAX_GROUP_SIZE:
            raise InvalidInputError("keys", f"at most {MAX_GROUP_SIZE - group.next_place} branches", count)
        first = group.next_place
        group.size += count
        group.next_place += count
        group.reserved.update(range(first, group.next_place))
        return first

    def release(self, round_id: str, group_id: str, first: int, count: int) -> list[str]:
        """Give up what `reserve` reserved, as far as nobody has arrived there; returns what `finish` returns.

        Nothing of a round or group that is not known.
        """
        entry = self._find(round_id)
        group = None if entry is None else entry.groups.get(group_id)
        if entry is None or group is None or entry.closed:
            return []
        given_up = group.reserved & set(range(first, first + count))
        group.reserved -= given_up
        group.size -= len(given_up)
        return self._complete(round_id, entry, group) if given_up else []

    def finish(self, request_id: str, num_output_tokens: int) -> list[str]:
        """A live member finished by itself.

        Returns:
            If its group is complete now: park keys of members that can't be forked any more.

        """
        round_id, entry, metadata = self._remove(request_id)
        group = entry.groups[metadata.group]
        group.finished.add(metadata.index)
        group.num_output_tokens += num_output_tokens
        if metadata.can_fork and metadata.park is not None:
            group.kept.append(metadata.park)
        done = self._complete(round_id, entry, group)
        self._settle(round_id, entry)
        return done

    def _complete(self, round_id: str, entry: _Round, group: _Group) -> list[str]:
        """Count a group if it is complete."""
        if len(group.finished) < group.size:
            return []
        entry.num_complete_groups += 1
        entry.num_kept_tokens += group.num_output_tokens
        self.totals.complete_groups += 1
        self.totals.kept_tokens += group.num_output_tokens
        if entry.num_complete_groups == entry.target_groups:
            self._ready.append((round_id, entry))
        done, group.kept = group.kept, []
        return done

    def leave(self, request_id: str) -> None:
        """A live member ended without finishing (caller's abort, error). Its place may be taken again."""
        round_id, entry, _ = self._remove(request_id)
        self._settle(round_id, entry)

    def dismiss(self, request_id: str) -> list[str]:
        """A live member goes, and its group is smaller by one; returns what `finish` returns."""
        round_id, entry, metadata = self._remove(request_id)
        group = entry.groups[metadata.group]
        group.size -= 1
        done = self._complete(round_id, entry, group)
        self._settle(round_id, entry)
        return done

    def pause(self, request_id: str, num_output_tokens: int) -> None:
        """A live member stops at a boundary; its place is kept for it, whether it goes on or not."""
        round_id, entry, metadata = self._remove(request_id)
        group = entry.groups[metadata.group]
        group.paused.add(metadata.index)
        group.num_output_tokens += num_output_tokens
        self._settle(round_id, entry)

    def finish_paused(self, round_id: str, group_id: str, index: int) -> list[str]:
        """A member that was paused ends there; returns what `finish` returns.

        Nothing of a round or group that is not known.
        """
        entry = self._find(round_id)
        group = None if entry is None else entry.groups.get(group_id)
        if entry is None or group is None or entry.closed or index not in group.paused:
            return []
        group.paused.discard(index)
        group.finished.add(index)
        return self._complete(round_id, entry, group)

    def cut_ready(self) -> list[str]:
        """Close every round that reached its target since the last call; returns the members to stop."""
        if not self._ready:
            return []
        ready, self._ready = self._ready, []
        self.totals.cuts += len(ready)
        return [request_id for round_id, entry in ready for request_id in self._close(round_id, entry)]

    def close(self, round_id: str) -> list[str]:
        """End a round before its target; returns the members to stop, which are no longer in the books.

        Raises:
            InvalidInputError: no such round.

        """
        return self._close(round_id, self._known(round_id))

    def kept_keys(self, round_id: str) -> list[str]:
        """Park keys of the finished members of a known round that may be forked."""
        return [key for group in self._known(round_id).groups.values() for key in group.kept]

    def forget(self, round_id: str) -> RoundCounts:
        """Drop a round that has no live member, and return its final numbers.

        Raises:
            InvalidInputError: no such round, or it has live members.

        """
        entry = self._known(round_id)
        if entry.live:
            raise InvalidInputError("round", "a round without live members", round_id)
        del self._idle[round_id]
        return entry.counts()

    def opened_ts(self, round_id: str) -> float:
        """When the first member of a known round arrived."""
        return self._known(round_id).opened_ts

    def note_step(self, num_running: int, kv_usage: float = 0.0) -> None:
        """Account one engine step to every round that has live members.

        `num_running` requests were in the batch, and running requests hold `kv_usage` (0 to 1) of the KV pool.
        """
        if self._live:
            self.totals.steps += 1
        for entry in self._live.values():
            entry.num_steps += 1
            entry.peak_kv_usage = max(entry.peak_kv_usage, kv_usage)
            idle = entry.peak_running - num_running
            if idle < 0:
                entry.peak_running = num_running
            else:
                entry.idle_slot_steps += idle
                self.totals.idle_slot_steps += idle

    def counts(self, round_id: str) -> RoundCounts:
        """The round's numbers so far.

        Raises:
            InvalidInputError: no such round.

        """
        return self._known(round_id).counts()

    def live_members(self, round_id: str) -> list[str]:
        """Request ids of the live members of a known round."""
        return list(self._known(round_id).live)

    @property
    def num_live_rounds(self) -> int:
        """Rounds with at least one live member."""
        return len(self._live)

    def _find(self, round_id: str) -> _Round | None:
        return self._live.get(round_id) or self._idle.get(round_id)

    def _known(self, round_id: str) -> _Round:
        if (entry := self._find(round_id)) is None:
            raise InvalidInputError("round", "the id of a round that this engine knows", round_id)
        return entry

    def _remove(self, request_id: str) -> tuple[str, _Round, RolloutMetadata]:
        round_id = self._round_of.pop(request_id)
        entry = self._live[round_id]
        metadata = entry.live.pop(request_id)
        entry.groups[metadata.group].live.discard(metadata.index)
        return round_id, entry, metadata

    def _close(self, round_id: str, entry: _Round) -> list[str]:
        cut = list(entry.live)
        entry.closed = True
        self._count_cut(entry, len(cut))
        for request_id in cut:
            self._remove(request_id)
        self._settle(round_id, entry)
        return cut

    def _count_cut(self, entry: _Round, num_members: int) -> None:
        entry.num_cut_members += num_members
        self.totals.cut_members += num_members

    def _settle(self, round_id: str, entry: _Round) -> None:
        """Move a round without live members out of the hot path, and forget the oldest beyond the bound."""
        # Another round of this name may have begun since.
        if entry.live or self._live.get(round_id) is not entry:
            return
        del self._live[round_id]
        self._idle[round_id] = entry
        if len(self._idle) > self._max_idle_rounds:
            self._idle.popitem(last=False)


def _check_consistent(entry: _Round, metadata: RolloutMetadata) -> None:
    if metadata.target_groups != entry.target_groups:
        raise InvalidInputError(
            "rollout.target_groups",
            f"{entry.target_groups}, as the other members of round {metadata.round!r} say",
            metadata.target_groups,
        )
    if (group := entry.groups.get(metadata.group)) is None:
        return
    if metadata.index in group.reserved or metadata.index in group.paused:
        return
    if metadata.group_size != group.declared_size:
        raise InvalidInputError(
            "rollout.group_size",
            f"{group.declared_size}, as the other members of group {metadata.group!r} say",
            metadata.group_size,
        )
    if metadata.index in group.live or metadata.index in group.finished:
        raise InvalidInputError(
            "rollout.index", f"a member of group {metadata.group!r} that has not arrived yet", metadata.index
        )
