"""What the synchronous and the asyncio client have in common: every call, as steps that wait for nothing themselves.

A call is a generator of `Step`s: whoever runs it waits until the step's future is done, in its own way, and goes on.
`client.py` waits in the caller's thread, `async_client.py` in an event loop. A call whose time is up is closed.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from longtail.engine.config import SamplingConfig
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.connection.io import ClientIO, into, new_reply
from longtail.trainer_bridge.connection.prompts import PromptFeed, encode_prompts, packets
from longtail.trainer_bridge.connection.push import ClientPush
from longtail.trainer_bridge.connection.round_reader import RecentIds, RoundReader, StreamReader
from longtail.trainer_bridge.connection.session import ClientSession
from longtail.trainer_bridge.connection.shelves import EVALUATION_IDS, MADE_UP, ROUND_IDS, STREAM_IDS
from longtail.trainer_bridge.errors import BridgeTimeoutError, InvalidInputError
from longtail.trainer_bridge.keys import ClientKeys

T = TypeVar("T")

_MAX_NAME_CHARS = 160
_MAX_PREFETCH = 1 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """Something to be waited for; `phase` says what, in words."""

    future: Future[Any]
    phase: str


#: Yields steps, goes on when they are done, and returns its result.
Call = Generator[Step, None, T]


class BridgeCalls:
    """One client, before it is known how its caller waits. Thread-safe.

    Args:
        address: of the service.
        consumer: name of the trainer, the same after a restart.
        keys: of a service that wants them.
        cursor: of the checkpoint that the trainer goes on from.
        prefetch: how many deliveries may wait for their user.

    Raises:
        InvalidInputError: an argument is wrong.

    """

    def __init__(
        self, address: str, *, consumer: str, keys: ClientKeys | None, cursor: wire.Cursor | None, prefetch: int
    ) -> None:
        _check_name("consumer", consumer)
        _check_count("prefetch", prefetch, _MAX_PREFETCH)
        if cursor is not None and not isinstance(cursor, wire.Cursor):
            raise InvalidInputError("cursor", "a Cursor of an earlier client, or None", cursor)
        if keys is not None and not isinstance(keys, ClientKeys):
            raise InvalidInputError("keys", "ClientKeys, or None", keys)
        instance = secrets.token_hex(8)
        self.session = ClientSession(
            address, consumer, instance, cursor=cursor, prefetch=prefetch, clock=time.monotonic
        )
        self.io = ClientIO(address, self.session, keys)
        self._seen = RecentIds()

    def timed_out(self, phase: str, timeout_s: float) -> BridgeTimeoutError:
        """The error of a wait that ran out."""
        with self.io.lock:
            return BridgeTimeoutError(self.io.address, phase, timeout_s, self.session.describe())

    # ---- session -----------------------------------------------------------------------------------------------

    def open(self) -> Call[None]:
        """Wait for a session."""
        future = new_reply()
        with self.io.lock:
            self.io.check()
            self.session.await_welcome(into(future))
        self.io.wake()
        yield Step(future, "the service to welcome this client")
        future.result()

    @property
    def welcome(self) -> wire.Welcome:
        """Of the present session, or of the last one."""
        with self.io.lock:
            self.io.check()
            assert self.session.welcome is not None
            return self.session.welcome

    @property
    def status(self) -> wire.Status:
        """The last that was heard."""
        with self.io.lock:
            self.io.check()
            assert self.session.status is not None
            return self.session.status

    def ask_status(self) -> Call[wire.Status]:
        """Ask the service what it is doing."""
        future = self.io.ask_status()
        yield Step(future, "the service's status")
        heartbeat: wire.Heartbeat = future.result()
        return heartbeat.status

    def ask_checksum(self) -> Call[wire.Checksum]:
        """Ask for checksums of the weights."""
        future = self.io.ask(lambda request_id: wire.AskChecksum(request_id=request_id))
        yield Step(future, "the checksum of the model's weights")
        reply: wire.Checksum = future.result()
        return reply

    @property
    def cursor(self) -> wire.Cursor:
        """Everything that was handed out, up to the first delivery that was not."""
        with self.io.lock:
            self.io.check()
            return self.session.cursor

    def ack(self, cursor: wire.Cursor | None) -> Call[None]:
        """Acknowledge what was handed out, or less."""
        future = new_reply()
        with self.io.lock:
            self.io.check()
            now = self.session.cursor
            cursor = now if cursor is None else cursor
            if not isinstance(cursor, wire.Cursor) or cursor.epoch != now.epoch or not 0 <= cursor.seq <= now.seq:
                raise InvalidInputError("cursor", f"a Cursor of {now.epoch}, at most {now.seq}", cursor)
            if cursor.seq <= self.session.acked:
                return
            self.session.acknowledge(cursor.seq, into(future))
        self.io.wake()
        yield Step(future, f"the deliveries up to {cursor.seq} to be acknowledged")
        future.result()

    # ---- prompts and rounds ------------------------------------------------------------------------------------

    def append_prompts(self, prompts: Sequence[Any], *, first: int | None, group_size: int) -> Call[int]:
        """Append prompts at the positions from `first` on; returns how many the service has then."""
        _check_count("group_size", group_size)
        num_prompts = self.status.num_prompts
        first = num_prompts if first is None else first
        for position, payload in packets(_Shifted(prompts, first), first):
            future = self.io.append_prompts(position, group_size, payload)
            yield Step(future, f"prompts from {position} on to be appended")
            num_prompts = future.result().num_prompts
        return num_prompts

    def start_round(
        self,
        on_change: Callable[[], None],
        prompts: Any,
        *,
        group_size: int,
        target_groups: int | None,
        over_provision: float | None,
        sampling: SamplingConfig,
        round_id: str | None,
        carry: bool,
        preview: bool,
    ) -> Call[RoundReader]:
        """Start a round, or take up one that runs already; `on_change` is called when its reader has more to do."""
        group_size = _checked_size(group_size, sampling, "round_id", round_id)
        payload, feed = None, None
        if not carry:
            payload = encode_prompts(prompts, 0)
            target_groups = len(prompts) if target_groups is None else target_groups
        elif target_groups is None:
            raise InvalidInputError("target_groups", "a number, because the round carries over", None)
        _check_count("target_groups", target_groups)
        if over_provision is not None and not (
            isinstance(over_provision, (int, float)) and math.isfinite(over_provision) and over_provision >= 1
        ):
            raise InvalidInputError("over_provision", "a number >= 1", over_provision)
        if carry and prompts is not None:
            feed = PromptFeed(prompts, group_size, math.ceil(target_groups * (over_provision or 1.0)))
        kind = ROUND_IDS if carry else EVALUATION_IDS
        if carry and round_id is None:
            yield from self._catch_up()
        with self.io.lock:
            self.io.check()
            left = self.session.shelves.left_behind(kind, self.session.started) if carry and not round_id else None
            name = round_id or left or kind + secrets.token_hex(8)
            reader = RoundReader(
                self.io, self.session.claim(name, on_change), feed, on_change,
                wants_trajectories=preview, seen=self._seen, may_swap=carry and round_id is None,
            )  # fmt: skip
        start = wire.StartRound(
            request_id=0, round_id=name, group_size=group_size, sampling=sampling, target_groups=target_groups,
            over_provision=over_provision, carry=carry, preview=preview, num_bytes=len(payload or b""),
        )  # fmt: skip
        yield from self._start(reader, start, payload)
        return reader

    def start_stream(
        self,
        on_change: Callable[[], None],
        prompts: Any,
        *,
        group_size: int,
        num_groups: int,
        sampling: SamplingConfig,
        stream_id: str | None,
    ) -> Call[StreamReader]:
        """Start a stream, or take up one that runs already."""
        group_size = _checked_size(group_size, sampling, "stream_id", stream_id)
        _check_count("num_groups", num_groups)
        feed = None if prompts is None else PromptFeed(prompts, group_size, num_groups)
        name = stream_id or STREAM_IDS + secrets.token_hex(8)
        start = wire.StartRound(
            request_id=0, round_id=name, group_size=group_size, sampling=sampling, num_groups=num_groups
        )
        with self.io.lock:
            self.io.check()
            shelf = self.session.claim(name, on_change, is_stream=True)
            reader = StreamReader(self.io, shelf, feed, on_change, start)
        yield from self._start(reader, start, None)
        return reader

    def cancel(self, round_id: str) -> Call[None]:
        """End a round or a stream."""
        _check_name("round_id", round_id)
        future = self.io.ask(lambda request_id: wire.CancelRound(request_id=request_id, round_id=round_id))
        yield Step(future, f"round {round_id} to be cancelled")
        future.result()

    @property
    def unclaimed_rounds(self) -> list[str]:
        """Rounds of which deliveries are here that nobody has asked for, oldest first."""
        with self.io.lock:
            self.io.check()
            return self.session.shelves.unclaimed

    def discard(self, round_id: str) -> None:
        """Count what has come of a round that nobody reads as handed out."""
        with self.io.lock:
            self.io.check()
            self.session.discard(round_id)
        self.io.wake()

    # ---- weights -----------------------------------------------------------------------------------------------

    def push_channel(self, push_id: str) -> ClientPush:
        """The way for one push."""
        return ClientPush(self.io, push_id)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _start(self, reader: RoundReader | StreamReader, start: wire.StartRound, payload: bytes | None) -> Call[None]:
        """Start what is claimed, once the service has prompts for it; what has ended needs neither."""
        is_accepted = False
        try:
            if not reader.is_complete:
                if reader.feeds:
                    yield from self.ask_status()  # of how many prompts were used since the last heartbeat
                while (future := reader.top_up(is_running=False)) is not None:
                    yield Step(future, "prompts to be appended")
                future = reader.ask_start(start, payload)
                yield Step(future, f"the round {start.round_id} to be accepted")
                future.result()
            is_accepted = True
        finally:
            if not is_accepted:
                # Nobody could take up an evaluation, whose name nobody knows.
                reader.close(cancel=isinstance(reader, RoundReader) and reader.is_evaluation)

    def _catch_up(self) -> Call[None]:
        """Let what an earlier process left behind come in."""
        while True:
            with self.io.lock:
                self.io.check()
                if self.session.has_caught_up:
                    return
                future = new_reply()
                self.session.await_delivery(into(future))
            yield Step(future, "deliveries that an earlier client left")


class _Shifted:
    """A sequence whose first item has the position `first`."""

    def __init__(self, items: Sequence[Any], first: int) -> None:
        if isinstance(items, (str, bytes)) or not isinstance(items, Sequence):
            raise InvalidInputError("prompts", "a list of prompts", items)
        self._items = items
        self._first = first

    def __len__(self) -> int:
        return self._first + len(self._items)

    def __getitem__(self, position: int) -> Any:
        return self._items[position - self._first]


def check_timeout(timeout_s: object) -> float:
    """A bound in seconds.

    Raises:
        InvalidInputError: it is none.

    """
    is_number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if not is_number or not 0 < timeout_s <= threading.TIMEOUT_MAX:  # type: ignore[operator]
        raise InvalidInputError("timeout_s", "seconds above 0", timeout_s)
    return float(timeout_s)  # type: ignore[arg-type]


def _check_name(field: str, value: object) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME_CHARS:
        raise InvalidInputError(field, f"1 to {_MAX_NAME_CHARS} characters", value)


def _check_count(field: str, value: object, high: int = 1 << 31) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise InvalidInputError(field, f"an integer in [1, {high}]", value)


def _checked_size(group_size: int, sampling: object, field: str, round_id: object) -> int:
    """Check what a round and a stream have in common; returns the members of a group."""
    _check_count("group_size", group_size)
    if not isinstance(sampling, SamplingConfig):
        raise InvalidInputError("sampling", "a SamplingConfig", sampling)
    if round_id is not None:
        _check_name(field, round_id)
        if str(round_id).startswith(MADE_UP):
            raise InvalidInputError(field, f"a name that does not begin with {MADE_UP}, as made-up ones do", round_id)
    return sampling.num_members(group_size)
