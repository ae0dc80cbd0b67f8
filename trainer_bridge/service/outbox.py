"""Deliveries that the trainer has not acknowledged: numbered, durable, each round once.

What `put_group` and `put_round` returned from is here until it is acknowledged, whatever dies meanwhile; a round whose
id was taken is never taken again, and the groups that streams gave are known by their keys, so that what the engine
gives a second time after a crash is known. Without a path all of it lasts as long as the process.

One thread at a time writes, under a lock; `entry` and the numbers may be read by any thread at any time without one.
It does not know sockets, and what payloads mean.

The journal's records are structs of this module; a `_Put` is followed by its payload as it is.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from longtail.engine.errors import InvalidInputError
from longtail.engine.journal import Journal, JournalError
from longtail.trainer_bridge.service.refusals import Refusal
from longtail.trainer_bridge.wire import MAX_DELIVERY_BYTES

#: Ids of rounds that were taken, of those that carry over and of the others; an engine repeats its last round only, and
#: a client one that it waits for.
MAX_TAKEN_IDS = 1000
#: Keys of groups that streams gave. An engine repeats the last one only, but perhaps long after it.
MAX_GROUP_KEYS = 4096

_MAX_FRAME_BYTES = 1 << 28
_POLL_S = 0.5


class Entry(NamedTuple):
    """One delivery; `is_part` of a round that was put whole, `is_own` of one that does not carry over."""

    seq: int
    round_id: str
    kind: Literal["group", "round"]
    payload: bytes
    is_part: bool
    is_own: bool = False


class _Record(msgspec.Struct, tag=True, frozen=True):
    pass


class _Put(_Record, frozen=True):
    seq: int
    round_id: str
    kind: Literal["group", "round"]
    is_part: bool = False
    key: str | None = None
    is_own: bool = False


class _Acked(_Record, frozen=True):
    seq: int


class _State(_Record, frozen=True):
    """First record of every file; entries follow when it was compacted."""

    epoch: str
    engine_id: str
    acked: int = 0
    taken: list[str] = []
    num_put: dict[str, int] = {}
    stream_key: str | None = None  # of files that only have the last one
    group_keys: list[str] = []
    taken_own: list[str] = []


class Outbox:
    """See the module.

    Args:
        path: of the journal; `None` keeps everything in memory.
        max_unacked: with so many entries there is no room any more,
        max_unacked_bytes: or with so many bytes of payload. Nothing is refused for it: who puts asks before.

    Attributes:
        epoch: names this stream of deliveries.
        engine_id: names the state that it belongs to.
        acked: everything up to here is done with.
        last_seq: the newest entry.
        num_unacked: entries that are here; `num_unacked_bytes` their payloads.

    Raises:
        JournalError: the file is another's, in use, or holds what this version can't read.

    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_unacked: int = 4096,
        max_unacked_bytes: int = 1 << 30,
    ) -> None:
        self.acked = 0
        self.last_seq = 0
        self.num_unacked_bytes = 0
        self.epoch = self.engine_id = ""
        self._max_unacked = max_unacked
        self._max_unacked_bytes = max_unacked_bytes
        self._entries: dict[int, Entry] = {}
        self._taken: dict[str, None] = {}
        self._taken_own: dict[str, None] = {}
        self._group_keys: dict[str, None] = {}
        self._num_put: dict[str, int] = {}
        self._writing = threading.Lock()
        self._room = threading.Condition()
        self._journal = None if path is None else Journal(path)
        try:
            if self._journal is not None:
                self._replay(self._journal)
            if not self.epoch:
                self._commit([(_State(secrets.token_hex(8), secrets.token_hex(8)), None)])
            self._compact_if_large()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up the journal."""
        with self._writing:
            if self._journal is not None:
                self._journal.close()

    @property
    def num_unacked(self) -> int:
        """See the class."""
        return self.last_seq - self.acked

    @property
    def has_room(self) -> bool:
        """A round may start."""
        return self.num_unacked < self._max_unacked and self.num_unacked_bytes < self._max_unacked_bytes

    def wait_for_room(self, is_stopped: Callable[[], bool]) -> None:
        """Return when there is room, or when `is_stopped` says so (asked every half second, and after `wake`)."""
        with self._room:
            while not (self.has_room or is_stopped()):
                self._room.wait(_POLL_S)

    def wake(self) -> None:
        """Let `wait_for_room` ask again."""
        with self._room:
            self._room.notify_all()

    def entry(self, seq: int) -> Entry | None:
        """A delivery that is here."""
        return self._entries.get(seq)

    def is_taken(self, round_id: str) -> bool:
        """A round of this id was put whole: one of the last `MAX_TAKEN_IDS` of its kind."""
        return round_id in self._taken or round_id in self._taken_own

    def is_group_taken(self, key: str) -> bool:
        """A group of this key was put: one of the last `MAX_GROUP_KEYS`."""
        return key in self._group_keys

    # ---- changes -----------------------------------------------------------------------------------------------

    def put_group(self, round_id: str, payload: bytes, key: str | None) -> None:
        """Take a stream's group; on the disk when it returns. `key` names the group for good.

        Raises:
            Refusal: it is longer than a delivery can be.
            JournalError: it is not on the disk, and not here.

        """
        with self._writing:
            self._commit([(_Put(self.last_seq + 1, round_id, "group", key=key), _checked(payload))])
            self._compact_if_large()

    def put_round(self, round_id: str, groups: Sequence[bytes], end: bytes, *, is_own: bool = False) -> bool:
        """Take a round: its groups, then the round itself. False if it was taken before.

        One that does not carry over `is_own`: many of those do not make the others be forgotten.

        All of it is on the disk when it returns. If it raises, some of the groups may be; calling it again goes on
        with the others.

        Raises:
            Refusal: one is longer than a delivery can be.
            JournalError: not all of it is on the disk.

        """
        for payload in (*groups, end):
            _checked(payload)
        with self._writing:
            if self.is_taken(round_id):
                return False
            left = [("group", payload) for payload in groups[self._num_put.get(round_id, 0) :]]
            for batch in _batches([*left, ("round", end)]):
                first = self.last_seq + 1
                puts = [_Put(first + i, round_id, kind, True, None, is_own) for i, (kind, _) in enumerate(batch)]
                self._commit([(put, body) for put, (_, body) in zip(puts, batch, strict=True)])
            self._compact_if_large()
            return True

    def ack(self, seq: int) -> int:
        """Forget everything up to `seq`; on the disk when it returns. Returns how many entries that were.

        Raises:
            InvalidInputError: there is no delivery `seq` yet.
            JournalError: it is not on the disk, and nothing is forgotten.

        """
        with self._writing:
            if seq > self.last_seq:
                raise InvalidInputError("seq", f"at most {self.last_seq}, the newest delivery", seq)
            if (num_removed := seq - self.acked) > 0:
                self._commit([(_Acked(seq), None)])
                self._compact_if_large()
        self.wake()
        return max(num_removed, 0)

    def _commit(self, records: Sequence[tuple[_Record, bytes | None]]) -> None:
        if self._journal is not None:
            self._journal.append([part for record in records for part in _parts(*record)])
        for record, payload in records:
            self._apply(record, payload)

    def _apply(self, record: _Record, payload: bytes | None) -> None:
        match record:
            case _Put(seq, round_id, kind, is_part, key, is_own):
                assert payload is not None
                self._entries[seq] = Entry(seq, round_id, kind, payload, is_part, is_own)
                self.num_unacked_bytes += len(payload)
                if key is not None:
                    _remember(self._group_keys, key, MAX_GROUP_KEYS)
                if kind == "round":
                    self._num_put.pop(round_id, None)
                    _remember(self._taken_own if is_own else self._taken, round_id, MAX_TAKEN_IDS)
                elif is_part:
                    self._num_put[round_id] = self._num_put.get(round_id, 0) + 1
                # Last: whoever reads the number without the lock finds the entry.
                self.last_seq = seq
            case _Acked(seq):
                first, self.acked = self.acked + 1, seq
                for old in range(first, seq + 1):
                    self.num_unacked_bytes -= len(self._entries.pop(old).payload)
            case _State():
                self.epoch, self.engine_id = record.epoch, record.engine_id
                self.last_seq = self.acked = record.acked
                self._taken, self._num_put = dict.fromkeys(record.taken), dict(record.num_put)
                self._taken_own = dict.fromkeys(record.taken_own)
                self._group_keys = dict.fromkeys(record.group_keys)
                if record.stream_key is not None:
                    self._group_keys[record.stream_key] = None
            case _:
                raise AssertionError(record)

    # ---- the journal -------------------------------------------------------------------------------------------

    def _replay(self, journal: Journal) -> None:
        payloads = iter(journal.take())
        for number, payload in enumerate(payloads):
            try:
                record = _decoder.decode(payload)
                if isinstance(record, _State) != (number == 0):
                    raise ValueError("a file has one state, at its beginning")
                if isinstance(record, _Put) and record.seq != self.last_seq + 1:
                    raise ValueError(f"number {record.seq} after {self.last_seq}")
                self._apply(record, next(payloads) if isinstance(record, _Put) else None)
            except (msgspec.DecodeError, KeyError, ValueError, StopIteration) as error:
                raise JournalError(journal.path, f"record {number} is not one of deliveries ({error!r})") from error

    def _compact_if_large(self) -> None:
        if self._journal is not None:
            self._journal.compact_if_large(self._compacted)

    def _compacted(self) -> list[bytes]:
        """All that is here, as a journal begins."""
        num_put = dict(self._num_put)
        for entry in self._entries.values():  # reading them again counts them again
            if entry.is_part and entry.round_id in num_put:
                num_put[entry.round_id] -= 1
        state = _State(
            self.epoch,
            self.engine_id,
            self.acked,
            list(self._taken),
            num_put,
            group_keys=list(self._group_keys),
            taken_own=list(self._taken_own),
        )
        records: list[tuple[_Record, bytes | None]] = [(state, None)]
        for seq, round_id, kind, payload, is_part, is_own in self._entries.values():
            records.append((_Put(seq, round_id, kind, is_part, None, is_own), payload))
        return [part for record in records for part in _parts(*record)]


def _remember(names: dict[str, None], name: str, limit: int) -> None:
    """Put it last if it is new, and forget the first ones beyond `limit`."""
    names[name] = None
    while len(names) > limit:
        del names[next(iter(names))]


def _parts(record: _Record, payload: bytes | None) -> Iterator[bytes]:
    yield _encoder.encode(record)
    if payload is not None:
        yield payload


def _batches(items: Sequence[tuple[Any, bytes]]) -> Iterator[list[tuple[Any, bytes]]]:
    """Parts that fit a frame of the journal."""
    batch: list[tuple[Any, bytes]] = []
    num_bytes = 0
    for item in items:
        if batch and num_bytes + len(item[1]) > _MAX_FRAME_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(item)
        num_bytes += len(item[1])
    yield batch


def _checked(payload: bytes) -> bytes:
    # A frame of the journal has the record beside it.
    if len(payload) > (limit := MAX_DELIVERY_BYTES - 4096):
        raise Refusal(
            "full", "a delivery is too long", field="delivery", expected=f"at most {limit} bytes", got=len(payload)
        )
    return payload


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_Put | _Acked | _State)
