"""All groups that were submitted and not returned yet, and what must survive a crash of them.

A group is in exactly one place: *carried* (it runs or will go on), *banked* (complete, accepted by the hooks, not
returned), *returned* (in a round whose receipt is not known) or counted as accepted or filtered. Every change is a
record that is in the journal, if there is one, before it is made here; reading the records again gives the same store.

The end of a trajectory, and what is said of a group, is written with the next record that may not be lost, or with the
first that comes a second later: what a crash takes of it runs again, or is judged again. All else is on the disk when
its method returns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from longtail.engine.errors import InvalidInputError
from longtail.engine.group_state import GroupState, token_spans
from longtail.engine.journal import Journal, JournalError
from longtail.engine.packed_groups import PackedTrajectory, pack, pack_members, unpack, unpack_members
from longtail.engine.trajectory import Round, Trajectory

_FLUSH_INTERVAL_S = 1.0
#: More than this does not go into one frame of the journal, unless a single record is larger.
_MAX_FRAME_BYTES = 1 << 28


_Place = Literal["carried", "banked", "returned"]


class _Record(msgspec.Struct, tag=True, frozen=True):
    """One change of the store."""


class _Submitted(_Record, frozen=True):
    groups: list[GroupState]
    cursor: int


class _MemberEnded(_Record, frozen=True):
    serial: int
    index: int
    member: PackedTrajectory
    num_computed: int


class _Branched(_Record, frozen=True):
    serial: int
    parent: PackedTrajectory
    members: list[PackedTrajectory]


class _Restarted(_Record, frozen=True):
    serial: int


class _Filtered(_Record, frozen=True):
    serial: int
    reason: str


class _Banked(_Record, frozen=True):
    serial: int
    members: list[PackedTrajectory | None]
    metadata: dict[str, Any] | None = None


class _RoundBegan(_Record, frozen=True):
    round_no: int


class _RoundEnded(_Record, frozen=True):
    """`round` is without its groups, which the store has."""

    round: Round
    serials: list[int]


class _Taken(_Record, frozen=True):
    serial: int


class _State(_Record, frozen=True):
    """First record of a compacted journal; the groups follow, one record each, in three places."""

    totals: StoreTotals
    returned: Round | None


class _Held(_Record, frozen=True):
    """`group` is without its members."""

    group: GroupState
    members: list[PackedTrajectory | None]
    place: _Place


class StoreTotals(msgspec.Struct):
    """Counts since the store began.

    Attributes:
        cursor: prompts taken from the caller's.
        num_rounds: rounds begun.
        num_submitted: groups; always `num_accepted + num_filtered` and those that are carried and banked.

    """

    cursor: int = 0
    num_rounds: int = 0
    num_submitted: int = 0
    num_accepted: int = 0
    num_filtered: int = 0


class GroupStore:
    """See the module. Instances are not thread-safe.

    Args:
        path: of the journal; `None` keeps everything in memory.

    Attributes:
        carried: by serial, oldest first.
        banked: by serial, first banked first.
        recovered: a round that ended and that its caller perhaps never got, because the process died or the caller
            gave up at that moment. Whoever gives it to the caller sets it to `None`.
        num_torn_bytes: what a crash had left unfinished at the end of the journal.

    Raises:
        JournalError: the file is another's, in use, or holds what this version can't read.

    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.carried: dict[int, GroupState] = {}
        self.banked: dict[int, GroupState] = {}
        self.recovered: Round | None = None
        self._returned: dict[int, GroupState] = {}
        self.totals = StoreTotals()
        self._unwritten: list[bytes] = []
        self._written_at = time.monotonic()
        self._journal = None if path is None else Journal(path)
        self.num_torn_bytes = 0
        if self._journal is not None:
            self.num_torn_bytes = self._journal.num_torn_bytes
            self._replay(self._journal)
            self._compact_if_large()

    def close(self) -> None:
        """Write what is left, and give up the journal."""
        if self._journal is not None:
            try:
                self.flush()
            finally:
                self._journal.close()

    def groups(self) -> Iterator[GroupState]:
        """Every group that is here, banked ones first."""
        yield from self.banked.values()
        yield from self.carried.values()

    def versions(self) -> Iterator[int]:
        """The weight version of every run of tokens that is here, and in the round to give again."""
        for group in self.groups():
            yield from (version for version, _, _ in group.token_spans())
        for trajectory in () if self.recovered is None else self.recovered.trajectories:
            yield from (version for version, _, _ in token_spans(trajectory))

    def check(self) -> None:
        """Every submitted group is in exactly one place."""
        totals = self.totals
        assert not self.carried.keys() & self.banked.keys()
        held = len(self.carried) + len(self.banked)
        assert totals.num_submitted == totals.num_accepted + totals.num_filtered + held, (totals, held)

    # ---- changes -----------------------------------------------------------------------------------------------

    def submit(self, groups: Sequence[GroupState], cursor: int) -> None:
        """Take fresh groups in; on the disk when it returns."""
        self._commit(_Submitted(list(groups), cursor), durable=True)

    def end_member(self, serial: int, index: int, member: Trajectory, num_computed: int) -> None:
        """A member of a carried group ended, or was cut."""
        self._write(lambda: _MemberEnded(serial, index, pack(member, self._members_of(serial)), num_computed))
        self._set_member(serial, index, member, num_computed)

    def branch(self, serial: int, parent: Trajectory, members: Sequence[Trajectory]) -> None:
        """Branches join a carried group; on the disk when it returns.

        With what `parent` had then, if it runs: should its tokens be lost, those of its branches are still its own.
        """

        def record() -> _Record:
            known = self._members_of(serial)
            packed = pack(parent, known)
            known[parent.index] = parent
            return _Branched(serial, packed, [pack(member, known) for member in members])

        self._write(record, durable=True)
        self.carried[serial].add_branches(parent, members)

    def restart(self, serial: int) -> None:
        """A carried or banked group begins again from its prompt."""
        self._commit(_Restarted(serial))

    def filter(self, serial: int, reason: str) -> None:
        """A carried or banked group is refused."""
        self._commit(_Filtered(serial, reason))

    def bank(self, serial: int, members: Sequence[Trajectory], metadata: dict[str, Any] | None = None) -> None:
        """A carried group is complete and accepted; `members` and `metadata` are how the hooks left it."""
        self._write(lambda: _Banked(serial, pack_members(members), metadata))
        self._bank(serial, members, metadata)

    def begin_round(self) -> int:
        """The next round's number. The last round was received, as its receiver goes on."""
        assert self.recovered is None, "its caller gets it first"
        self._commit(_RoundBegan(self.totals.num_rounds + 1), durable=True)
        self._compact_if_large()
        return self.totals.num_rounds

    def end_round(self, round_: Round, serials: Sequence[int]) -> None:
        """A round takes banked groups, which are in it too; on the disk when it returns, until the next one begins."""
        self._commit(_RoundEnded(replace(round_, groups=[]), list(serials)), durable=True)
        self.recovered = round_
        self.check()
        self._compact_if_large()

    def take(self, serial: int) -> None:
        """A caller has received a banked group outside a round."""
        self._commit(_Taken(serial), durable=True)
        self._compact_if_large()

    def flush(self) -> None:
        """Everything is on the disk when it returns.

        Raises:
            JournalError: it is not; the store is usable, and the next call tries again.

        """
        while self._journal is not None and self._unwritten:
            num_records = num_bytes = 0
            while num_records < len(self._unwritten) and (num_bytes < _MAX_FRAME_BYTES or not num_records):
                num_bytes += len(self._unwritten[num_records])
                num_records += 1
            self._journal.append(self._unwritten[:num_records])
            del self._unwritten[:num_records]
        self._written_at = time.monotonic()

    def _commit(self, record: _Record, *, durable: bool = False) -> None:
        self._write(lambda: record, durable=durable)
        self._apply(record)

    def _write(self, record: Callable[[], _Record], *, durable: bool = False) -> None:
        """Put a change into the journal, if there is one, before it is made."""
        if self._journal is not None:
            self._unwritten.append(_encode(record()))
            if durable or time.monotonic() - self._written_at > _FLUSH_INTERVAL_S:
                try:
                    self.flush()
                except (JournalError, InvalidInputError):
                    if durable:
                        # It is not made; what may be lost waits for the next try.
                        self._unwritten.pop()
                        raise
                except BaseException:
                    # Interrupted: whether the file has it is not known. A new process reads what there is.
                    self._journal.close()
                    raise

    def _apply(self, record: _Record) -> None:
        match record:
            case _Submitted(groups, cursor):
                self.carried |= {group.serial: group for group in groups}
                self.totals.cursor = cursor
                self.totals.num_submitted += len(groups)
            case _MemberEnded(serial, index, member, num_computed):
                self._set_member(serial, index, unpack(member, self._members_of(serial)), num_computed)
            case _Branched(serial, parent, members):
                known = self._members_of(serial)
                whole = known[parent.index] = unpack(parent, known)
                self.carried[serial].add_branches(whole, [unpack(member, known) for member in members])
            case _Restarted(serial):
                group = self._remove(serial)
                group.restart(self.totals.num_rounds)
                self.carried[serial] = group
            case _Filtered(serial, _):
                self._remove(serial)
                self.totals.num_filtered += 1
            case _Banked(serial, members, metadata):
                self._bank(serial, unpack_members(members), metadata)
            case _RoundBegan(round_no):
                self.totals.num_rounds = round_no
                self.recovered, self._returned = None, {}
            case _RoundEnded(round_, serials):
                self._returned = {serial: self.banked.pop(serial) for serial in serials}
                self.totals.num_accepted += len(serials)
                self.recovered = round_
            case _Taken(serial):
                del self.banked[serial]
                self.totals.num_accepted += 1
            case _State(totals, returned):
                self.totals, self.recovered = totals, returned
            case _Held(group, members, place):
                group.members = unpack_members(members)
                places = {"carried": self.carried, "banked": self.banked, "returned": self._returned}
                places[place][group.serial] = group
            case _:
                raise AssertionError(record)

    def _set_member(self, serial: int, index: int, member: Trajectory, num_computed: int) -> None:
        group = self.carried[serial]
        group.members[index] = member
        group.num_computed[index] = num_computed

    def _bank(self, serial: int, members: Sequence[Trajectory | None], metadata: dict[str, Any] | None) -> None:
        group = self.carried.pop(serial)
        group.members, group.metadata = list(members), metadata
        self.banked[serial] = group

    def _members_of(self, serial: int) -> dict[int, Trajectory | None]:
        return dict(enumerate(self.carried[serial].members))

    def _remove(self, serial: int) -> GroupState:
        return self.carried.pop(serial) if serial in self.carried else self.banked.pop(serial)

    # ---- the journal -------------------------------------------------------------------------------------------

    def _replay(self, journal: Journal) -> None:
        for number, payload in enumerate(journal.take()):
            try:
                self._apply(_decoder.decode(payload))
            except (msgspec.DecodeError, ValueError, KeyError, IndexError) as error:
                raise JournalError(
                    journal.path, f"record {number} is not one of a longtail store ({error!r})"
                ) from error
        try:
            self.check()
        except AssertionError as error:
            raise JournalError(journal.path, f"its records do not add up: {error}") from error
        if self.recovered is not None:
            groups = [group.group(self.recovered.round_id) for group in self._returned.values()]
            self.recovered = replace(self.recovered, groups=groups)

    def _compact_if_large(self) -> None:
        if self._journal is not None:
            self._journal.compact_if_large(self._compacted)

    def _compacted(self) -> list[bytes]:
        """All that the store holds, as a journal begins."""
        self.flush()
        returned = None if self.recovered is None else replace(self.recovered, groups=[])
        records: list[_Record] = [_State(self.totals, returned)]
        records += [_held(group, "returned") for group in self._returned.values()]
        records += [_held(group, "banked") for group in self.banked.values()]
        records += [_held(group, "carried") for group in self.carried.values()]
        return [_encode(record) for record in records]


def _held(group: GroupState, place: _Place) -> _Held:
    return _Held(replace(group, members=[]), pack_members(group.members), place)


def _encode(record: _Record) -> bytes:
    try:
        return _encoder.encode(record)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError("metadata", f"plain data, because a journal holds it ({error})", record) from error


_Any = (
    _Submitted
    | _MemberEnded
    | _Branched
    | _Restarted
    | _Filtered
    | _Banked
    | _RoundBegan
    | _RoundEnded
    | _Taken
    | _State
    | _Held
)
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_Any)
