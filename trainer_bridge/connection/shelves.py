"""Where a client keeps deliveries until its user takes them: one shelf a round, and what was handed out so far.

It knows the order of deliveries and nothing of messages, sessions or sockets; payloads are decoded by whoever reads a
shelf. Not thread-safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from longtail.engine.trajectory import Group, Round
from longtail.trainer_bridge.errors import InvalidInputError

#: Ids that the client makes up, by the kind of call; those of users do not begin with the first character. Nobody asks
#: for such a round by name after a restart: a call of the same kind takes it up, and an evaluation is dropped.
MADE_UP = "~"
ROUND_IDS, STREAM_IDS, EVALUATION_IDS = "~round-", "~stream-", "~eval-"

#: Previews that nobody has looked at; older ones are dropped, as any preview may be.
_MAX_PREVIEWS = 1024


@dataclass(slots=True)
class Entry:
    """A delivery; `value` is its payload once that was decoded."""

    seq: int
    round_id: str
    kind: Literal["group", "round"]
    payload: memoryview | None
    value: Group | Round | None = None


@dataclass(slots=True, eq=False)
class Shelf:
    """What has come of one round, or one stream, and was not handed out.

    Attributes:
        entries: in order of `seq`.
        failure: what ended the round without a result.
        on_change: of whoever reads the shelf; `None` when nobody does. Must not block.
        is_done: the service says that the round has ended, so that no more than its deliveries can come.
        is_over: it has, and all that was left of it has come.

    """

    round_id: str
    is_stream: bool = False
    entries: deque[Entry] = field(default_factory=deque)
    previews: deque[memoryview] = field(default_factory=lambda: deque(maxlen=_MAX_PREVIEWS))
    failure: Exception | None = None
    on_change: Callable[[], None] | None = None
    is_done: bool = False
    is_over: bool = False

    @property
    def is_claimed(self) -> bool:
        """Somebody reads it."""
        return self.on_change is not None

    @property
    def has_ended(self) -> bool:
        """The last delivery of the round is here."""
        return bool(self.entries) and self.entries[-1].kind == "round" and self.entries[-1].round_id == self.round_id

    @property
    def is_hungry(self) -> bool:
        """Its reader can do nothing before more has come."""
        if not self.is_claimed or self.failure is not None:
            return False
        return not self.entries if self.is_stream else not self.has_ended

    def changed(self) -> None:
        """Tell its reader."""
        if self.on_change is not None:
            self.on_change()


class Shelves:
    """All shelves of a session.

    Args:
        received: everything up to here has come before, or need not come.
        prefetch: how many deliveries may wait here for their user.

    Attributes:
        received: everything up to here has come.
        handed_up_to: everything up to here is the user's, or was dropped.

    """

    def __init__(self, received: int, prefetch: int) -> None:
        self.received = self.handed_up_to = received
        self._prefetch = prefetch
        self._handed_beyond: set[int] = set()
        self._shelves: dict[str, Shelf] = {}
        self._owners: dict[str, str] = {}
        self._closed_streams: dict[str, None] = {}
        self._unwanted_up_to = 0

    def __iter__(self) -> Iterator[Shelf]:
        return iter(list(self._shelves.values()))

    def get(self, round_id: str) -> Shelf | None:
        """The shelf that deliveries of a round go to, if there is one."""
        return self._shelves.get(self._owners.get(round_id, round_id))

    def put(self, entry: Entry, *, is_expected: bool) -> None:
        """Take the next delivery in.

        Args:
            entry: `seq` follows `received`.
            is_expected: this client has started the round.

        """
        assert entry.seq == self.received + 1
        self.received = entry.seq
        shelf = self.get(entry.round_id) or self._heir(entry.round_id) or self._of(entry.round_id)
        shelf.entries.append(entry)
        is_nobodys = not (is_expected or shelf.is_claimed)
        is_end_alone = entry.kind == "round" and len(shelf.entries) == 1 and entry.round_id in self._closed_streams
        if entry.kind == "round" and shelf.is_claimed and shelf.is_stream and len(shelf.entries) == 1:
            if entry.round_id != shelf.round_id:  # the end of an earlier stream is nothing to anybody
                self.hand_out([shelf.entries.pop()])
        elif is_nobodys and (entry.round_id.startswith(EVALUATION_IDS) or is_end_alone):
            self.drop(shelf)
        shelf.changed()

    def claim(self, round_id: str, on_change: Callable[[], None], *, is_stream: bool = False) -> Shelf:
        """Read what comes of a round; `on_change` is called when there is something new.

        A stream whose id was made up begins with what earlier such streams left.

        Raises:
            InvalidInputError: it is read already.

        """
        shelf = self._of(round_id)
        if shelf.is_claimed:
            raise InvalidInputError("round_id", "an id that no other call reads", round_id)
        shelf.on_change, shelf.is_stream, shelf.failure = on_change, is_stream, None
        shelf.is_done = shelf.is_over = False
        if is_stream and round_id.startswith(STREAM_IDS):
            self._adopt(shelf)
        return shelf

    def release(self, shelf: Shelf, *, is_expected: bool) -> None:
        """Read it no more. What lies on it stays for the next who claims it, but for a dropped evaluation."""
        shelf.on_change = None
        shelf.previews.clear()
        if shelf.is_stream and not is_expected:
            self._closed_streams[shelf.round_id] = None
        self._drop_unwanted(shelf)
        if not is_expected and (not shelf.entries or shelf.round_id.startswith(EVALUATION_IDS)):
            self.drop(shelf)

    def hand_out(self, entries: Iterable[Entry]) -> None:
        """The user has these."""
        self._handed_beyond.update(entry.seq for entry in entries)
        while self.handed_up_to + 1 in self._handed_beyond:
            self.handed_up_to += 1
            self._handed_beyond.remove(self.handed_up_to)

    def skip(self, seq: int) -> None:
        """Expect what follows `seq` next: what comes before it nobody wants, here or on its way.

        What somebody reads stays until it is read.
        """
        self._handed_beyond.update(range(self.received + 1, seq + 1))
        self.received = max(self.received, seq)
        self._unwanted_up_to = seq
        for shelf in self:
            self._drop_unwanted(shelf)
        self.hand_out([])

    def drop(self, shelf: Shelf) -> None:
        """Count what lies on it as handed out. Later deliveries of its round get a shelf of their own."""
        self._forget(shelf)
        self.hand_out(shelf.entries)

    @property
    def unclaimed(self) -> list[str]:
        """Rounds of which deliveries are here and which nobody reads, oldest first."""
        left = [shelf for shelf in self if shelf.entries and not shelf.is_claimed]
        return [shelf.round_id for shelf in sorted(left, key=lambda shelf: shelf.entries[0].seq)]

    def left_behind(self, prefix: str, started: Iterable[str]) -> str | None:
        """The oldest round with such an id that nobody reads: its deliveries are here, or it was started here."""
        for round_id in [*self.unclaimed, *started]:
            shelf = self.get(round_id)
            if round_id.startswith(prefix) and not (shelf is not None and shelf.is_claimed):
                return round_id
        return None

    @property
    def wanted_credit(self) -> int:
        """How far deliveries may come now.

        Who waits for a round needs what lies behind the others' deliveries, however many these are.
        """
        is_awaited = any(shelf.is_hungry for shelf in self)
        num_waiting = 0 if is_awaited else sum(len(shelf.entries) for shelf in self)
        return self.received + max(self._prefetch - num_waiting, 0)

    def finish(self, shelf: Shelf) -> None:
        """The user has all of a round that has ended."""
        shelf.on_change = None
        self.drop(shelf)

    def _of(self, round_id: str) -> Shelf:
        shelf = self.get(round_id)
        if shelf is None:
            shelf = self._shelves[round_id] = Shelf(round_id)
        return shelf

    def _drop_unwanted(self, shelf: Shelf) -> None:
        if shelf.is_claimed:
            return
        while shelf.entries and shelf.entries[0].seq <= self._unwanted_up_to:
            self.hand_out([shelf.entries.popleft()])

    def _heir(self, round_id: str) -> Shelf | None:
        """The stream that takes up what a stream of an earlier process delivers still."""
        if not round_id.startswith(STREAM_IDS):
            return None
        for shelf in self:
            if shelf.is_stream and shelf.is_claimed and shelf.round_id.startswith(STREAM_IDS):
                self._owners[round_id] = shelf.round_id
                return shelf
        return None

    def _forget(self, shelf: Shelf) -> None:
        self._shelves.pop(shelf.round_id, None)
        self._owners = {one: owner for one, owner in self._owners.items() if owner != shelf.round_id}

    def _adopt(self, shelf: Shelf) -> None:
        entries = [*shelf.entries]
        for other in self:
            if other.round_id.startswith(STREAM_IDS) and not other.is_claimed:
                entries += other.entries
                self._forget(other)
                self._owners[other.round_id] = shelf.round_id
        shelf.entries = deque(sorted(entries, key=lambda entry: entry.seq))
