"""What one caller reads of a round or a stream: it takes deliveries from their shelf and never waits.

A reader belongs to its caller's thread, where payloads are decoded and the prompts of the training run are looked up.
`rounds.py` waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import msgspec

from longtail.engine.trajectory import Group, Round, Trajectory
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.connection.io import ClientIO
from longtail.trainer_bridge.connection.prompts import PromptFeed
from longtail.trainer_bridge.connection.shelves import EVALUATION_IDS, ROUND_IDS, Entry, Shelf
from longtail.trainer_bridge.errors import BridgeError, BridgeRefusedError

_MAX_RECENT = 1 << 16


class RecentIds:
    """Trajectories that were shown as previews, as many as may still come in a round. Used under the client's lock."""

    def __init__(self) -> None:
        self._ids: dict[str, None] = {}

    def add(self, trajectory_id: str) -> bool:
        """Whether it is new."""
        if trajectory_id in self._ids:
            return False
        self._ids[trajectory_id] = None
        if len(self._ids) > _MAX_RECENT:
            del self._ids[next(iter(self._ids))]
        return True


class ShelfReader:
    """What readers of rounds and of streams have in common.

    Args:
        io: of the client.
        shelf: claimed by this reader, with `on_change`.
        feed: the prompts that the service is to have, if the caller gave them.
        on_change: tells the caller to look again.

    Attributes:
        has_ended: there is nothing more to read.
        cancelling: done once the service has been told to end it.

    """

    def __init__(self, io: ClientIO, shelf: Shelf, feed: PromptFeed | None, on_change: Callable[[], None]) -> None:
        self._io = io
        self._session = io.session
        self._shelf = shelf
        self._feed = feed
        self._on_change = on_change
        self._appending: Future[Any] | None = None
        self.cancelling: Future[Any] | None = None
        self.has_ended = False

    @property
    def round_id(self) -> str:
        """The round that is read now."""
        return self._shelf.round_id

    @property
    def feeds(self) -> bool:
        """It has prompts for the service."""
        return self._feed is not None

    @property
    def is_complete(self) -> bool:
        """All of the round is here."""
        with self._io.lock:
            return self._shelf.has_ended

    def close(self, *, cancel: bool) -> None:
        """Read no more. With `cancel` the round is to end at the service, too; otherwise it can be taken up again."""
        if self.has_ended:
            return
        self.has_ended = True
        round_id = self._shelf.round_id
        with self._io.lock:
            self._session.release(self._shelf, is_over=cancel)
            if cancel and self._session.failure is None:
                self.cancelling = self._io.ask(lambda id_: wire.CancelRound(request_id=id_, round_id=round_id))
        self._io.wake()

    def ask_start(self, start: wire.StartRound, payload: bytes | None = None) -> Future[Any]:
        """Send the request that starts what is read."""
        return self._io.ask(lambda request_id: msgspec.structs.replace(start, request_id=request_id), payload)

    def top_up(self, *, is_running: bool = True) -> Future[Any] | None:
        """Send the service prompts, if it needs some; returns what to wait for before the round starts.

        Raises:
            BridgeError, InvalidInputError: the last ones were refused.

        """
        if self._feed is None:
            return None
        with self._io.lock:
            status = self._session.status
        assert status is not None
        if self._appending is not None:
            if not self._appending.done():
                return self._appending
            appended, self._appending = self._appending, None
            try:
                appended.result()
            except BridgeRefusedError as error:
                if error.code != "full" or not self._feed.refused(status):
                    raise
        packet = self._feed.next_packet(status, is_running=is_running)
        if packet is not None:
            first, payload = packet
            self._appending = self._io.append_prompts(first, self._feed.group_size, payload)
            self._appending.add_done_callback(lambda _: self._on_change())
        return self._appending

    def _decode(self, entry: Entry) -> None:
        if entry.payload is not None:
            try:
                if entry.kind == "group":
                    entry.value = wire.decode_result(entry.payload, Group)
                else:
                    entry.value = wire.decode_result(entry.payload, Round)
            except wire.WireError as error:
                text = f"delivery {entry.seq} (round {entry.round_id}) could not be read: {error}"
                raise BridgeError(self._io.address, text) from error
            entry.payload = None

    def _raise_failure(self) -> None:
        if self._shelf.failure is not None:
            failure = self._shelf.failure
            self.close(cancel=False)
            raise failure


class RoundReader(ShelfReader):
    """Reads one round.

    Args:
        wants_trajectories: give trajectories as they end, too.
        seen: trajectories that were given as previews.
        may_swap: the caller named no round, so that it gets one that an earlier process left behind first.

    """

    def __init__(
        self,
        io: ClientIO,
        shelf: Shelf,
        feed: PromptFeed | None,
        on_change: Callable[[], None],
        *,
        wants_trajectories: bool,
        seen: RecentIds,
        may_swap: bool,
    ) -> None:
        super().__init__(io, shelf, feed, on_change)
        self._wants_trajectories = wants_trajectories
        self._seen = seen
        self._may_swap = may_swap
        self._ready: deque[Trajectory] = deque()
        self._round: Round | None = None

    def poll(self) -> Trajectory | Round | None:
        """A trajectory that has ended, or the round after the last one, which is not handed out before `finish`.

        `None`: look again when there is a change.

        Raises:
            BridgeError, InvalidInputError: the round failed, or the session.

        """
        if self.has_ended or (self._round is not None and not self._ready):
            return self._round
        with self._io.lock:
            self._io.check()
            self._raise_failure()
            self._swap()
            previews = list(self._shelf.previews)
            self._shelf.previews.clear()
            entries = list(self._shelf.entries)
            has_ended = self._shelf.has_ended
        for entry in entries:
            self._decode(entry)
        if self._wants_trajectories:
            for payload in previews:
                with suppress(wire.WireError):
                    self._show(wire.decode_result(payload, Trajectory))
        if has_ended and self._round is None:
            self._round = self._assemble(entries)
            if self._wants_trajectories:
                for trajectory in self._round.trajectories:
                    if trajectory.ended_by_itself:
                        self._show(trajectory)
        if self._ready:
            return self._ready.popleft()
        if self._round is None:
            self.top_up()
        return self._round

    def finish(self) -> None:
        """The user gets the round now: it counts as handed out."""
        assert self._round is not None
        if not self.has_ended:
            self.has_ended = True
            with self._io.lock:
                self._session.finish(self._shelf)
            self._io.wake()

    def describe(self) -> str:
        """What is waited for, in words."""
        num_groups = sum(entry.kind == "group" for entry in self._shelf.entries)
        return f"round {self.round_id} ({num_groups} groups of it are here)"

    @property
    def is_evaluation(self) -> bool:
        """It is one without a name, which nobody can take up again."""
        return self.round_id.startswith(EVALUATION_IDS)

    def _show(self, trajectory: Trajectory) -> None:
        with self._io.lock:
            if self._seen.add(trajectory.trajectory_id):
                self._ready.append(trajectory)

    def _swap(self) -> None:
        """Read an older round first, that was left behind and has come meanwhile; this one stays to be asked for."""
        if not self._may_swap or self._shelf.entries:
            return
        older = self._session.shelves.left_behind(ROUND_IDS, [])
        if older is not None:
            self._session.release(self._shelf, is_over=False)
            self._shelf = self._session.claim(older, self._on_change)

    def _assemble(self, entries: list[Entry]) -> Round:
        groups = [entry.value for entry in entries if isinstance(entry.value, Group)]
        last = entries[-1].value
        assert isinstance(last, Round)
        return msgspec.structs.replace(last, groups=groups)


class StreamReader(ShelfReader):
    """Reads one stream, and what earlier ones left to it.

    A stream ends when the service has no more prompts, be it that its client was too busy to send some. As long as
    there are more, another one goes on, `NAME~1` and so on, which a restarted trainer finds as this one did.

    Args:
        start: what started it.

    """

    def __init__(
        self,
        io: ClientIO,
        shelf: Shelf,
        feed: PromptFeed | None,
        on_change: Callable[[], None],
        start: wire.StartRound,
    ) -> None:
        super().__init__(io, shelf, feed, on_change)
        self._start = start
        self._num_continued = 0
        self._cancelled: set[str] = set()
        self._asked: Future[Any] | None = None
        self._starting: Future[Any] | None = None

    def poll(self) -> Group | None:
        """The next group; `None`: look again when there is a change, unless it `has_ended`.

        Raises:
            BridgeError, InvalidInputError: the stream failed, or the session.

        """
        if self.has_ended:
            return None
        if self._asked is not None:
            self._go_on(self._asked)
            return None
        with self._io.lock:
            self._io.check()
            entry = self._next_entry()
            is_over = entry is None and self._shelf.is_over
            if entry is None:
                self._raise_failure()
        if entry is None and not is_over:
            self._raise_refusal()
            self.top_up()
            return None
        if entry is None or entry.kind == "round":
            self._end()
            return None
        self._decode(entry)
        with self._io.lock:
            self._shelf.entries.popleft()
            self._session.hand_out([entry])
            self._next_entry()  # ends of earlier streams hold up the cursor no longer
        self._io.wake()
        assert isinstance(entry.value, Group)
        return entry.value

    @property
    def stream_id(self) -> str:
        """Its name, without that of what goes on with it."""
        return self._start.round_id

    def describe(self) -> str:
        """What is waited for, in words."""
        return f"a group of the stream {self.round_id}"

    def _end(self) -> None:
        """It has ended: for good, if there are no more prompts by now."""
        with self._io.lock:
            self._session.finish(self._shelf)
        if self._feed is None:
            self.has_ended = True
            return
        self._asked = self._io.ask_status()
        self._asked.add_done_callback(lambda _: self._on_change())

    def _go_on(self, asked: Future[Any]) -> None:
        if not asked.done():
            return
        assert self._feed is not None
        if not self._feed.has_more(asked.result().status):
            self.has_ended = True
            return
        if self.top_up(is_running=False) is not None:
            return
        self._num_continued += 1
        name = f"{self._start.round_id}~{self._num_continued}"
        with self._io.lock:
            self._shelf = self._session.claim(name, self._on_change, is_stream=True)
        self._starting = self.ask_start(msgspec.structs.replace(self._start, round_id=name))
        self._starting.add_done_callback(lambda _: self._on_change())
        self._asked = None
        self._on_change()

    def _raise_refusal(self) -> None:
        if self._starting is not None and self._starting.done():
            starting, self._starting = self._starting, None
            starting.result()

    def _next_entry(self) -> Entry | None:
        """The first one, after the ends of earlier streams, which must make room for this one."""
        entries = self._shelf.entries
        while entries and (round_id := entries[0].round_id) != self._shelf.round_id:
            if round_id not in self._cancelled:
                self._cancelled.add(round_id)
                self._io.ask(lambda id_, old=round_id: wire.CancelRound(request_id=id_, round_id=old))  # type: ignore[misc]
            if entries[0].kind == "group":
                break
            self._session.hand_out([entries.popleft()])
        return entries[0] if entries else None
