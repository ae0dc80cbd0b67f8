"""What a running round, or a stream, looks like to the user of a client: iterators, blocking or asyncio.

They wait for what `round_reader.py` finds on the shelves, each step for at most `timeout_s`. A wait that ran out ends
nothing: go on with `next`, or ask for the round again.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import wait
from typing import Self, TypeVar

from longtail.engine.trajectory import Group, Round, Trajectory
from longtail.trainer_bridge.connection.calls import BridgeCalls
from longtail.trainer_bridge.connection.round_reader import RoundReader, StreamReader

T = TypeVar("T")

#: A reader that was told nothing looks again, all the same.
_LOOK_S = 1.0
#: How long `close` waits for the service to have heard it.
_CLOSE_TIMEOUT_S = 30.0


class Bell:
    """Wakes a thread that waits for its reader."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def ring(self) -> None:
        """There is something new."""
        self._event.set()

    def wait_for(
        self,
        poll: Callable[[], T | None],
        has_ended: Callable[[], bool],
        deadline: float,
        timed_out: Callable[[], Exception],
    ) -> T | None:
        """What `poll` returns once it is something, or `None` after the end.

        Raises:
            Exception: `timed_out()`, after `deadline` of `time.monotonic`.

        """
        while True:
            self._event.clear()
            if (item := poll()) is not None or has_ended():
                return item
            if (left_s := deadline - time.monotonic()) <= 0:
                raise timed_out()
            self._event.wait(min(left_s, _LOOK_S))


class AsyncBell:
    """Wakes a task that waits for its reader; see `Bell`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def ring(self) -> None:
        """There is something new; in any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait_for(
        self,
        poll: Callable[[], T | None],
        has_ended: Callable[[], bool],
        deadline: float,
        timed_out: Callable[[], Exception],
    ) -> T | None:
        """See `Bell.wait_for`."""
        while True:
            self._event.clear()
            if (item := poll()) is not None or has_ended():
                return item
            if (left_s := deadline - time.monotonic()) <= 0:
                raise timed_out()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._event.wait(), min(left_s, _LOOK_S))


class _Round:
    """What the two kinds of rounds have in common."""

    def __init__(self, calls: BridgeCalls, reader: RoundReader | None, timeout_s: float) -> None:
        self._calls = calls
        self._reader = reader
        self._timeout_s = timeout_s
        self._round: Round | None = None
        self._is_waiting = False

    @property
    def round_id(self) -> str:
        """Its name; of a round that had none, the name of one that an earlier process left behind may come first."""
        if self._reader is None:
            raise RuntimeError("the round has not been started")
        return self._reader.round_id

    @property
    def round(self) -> Round:
        """The whole round.

        Raises:
            RuntimeError: it was not read to its end.

        """
        if self._round is None:
            raise RuntimeError("the round is there once its trajectories were read to the end")
        return self._round

    def close(self) -> None:
        """Cancel the round, unless it has ended. Safe to call at any time, and waits for nothing."""
        if self._reader is not None:
            with contextlib.suppress(Exception):  # a client that is closed has nothing to cancel
                self._reader.close(cancel=True)

    def leave(self) -> None:
        """Read no more, and let the round go on: who asks for it again gets it."""
        if self._reader is not None:
            with contextlib.suppress(Exception):
                self._reader.close(cancel=self._reader.is_evaluation)

    def _timed_out(self, reader: RoundReader) -> Exception:
        return self._calls.timed_out(reader.describe(), self._timeout_s)

    def _finish(self, reader: RoundReader, item: object) -> Round | None:
        if isinstance(item, Round):
            reader.finish()
            return item
        return None

    def __del__(self) -> None:
        if hasattr(self, "_is_waiting"):
            # After a timeout the next call is to find the round.
            self.leave() if self._is_waiting else self.close()


class ClientRound(_Round):
    """Trajectories of one round as they end, then `round`.

    Each is given once: when the service tells of it, or else with its group. What is iterated over is for progress and
    for scoring early; what to train on is in `round`, which hooks and the staleness bound have seen.
    """

    def __init__(self, calls: BridgeCalls, reader: RoundReader, bell: Bell, timeout_s: float) -> None:
        super().__init__(calls, reader, timeout_s)
        self._bell = bell

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Trajectory:
        return self.next_by(time.monotonic() + self._timeout_s)

    def next_by(self, deadline: float) -> Trajectory:
        """The next trajectory.

        Args:
            deadline: of `time.monotonic`, `timeout_s` after the wait began.

        Raises:
            StopIteration: there is none; `round` is there.
            BridgeTimeoutError: nothing came.

        """
        if self._round is None:
            self._is_waiting = True
            reader = self._reader
            assert reader is not None
            item = self._bell.wait_for(reader.poll, lambda: reader.has_ended, deadline, lambda: self._timed_out(reader))
            self._is_waiting = False
            if isinstance(item, Trajectory):
                return item
            self._round = self._finish(reader, item)
        raise StopIteration


class AsyncClientRound(_Round):
    """See `ClientRound`; `async for` over it. The round starts when the first trajectory is asked for."""

    def __init__(
        self, calls: BridgeCalls, start: Callable[[], Awaitable[RoundReader]], bell: AsyncBell, timeout_s: float
    ) -> None:
        super().__init__(calls, None, timeout_s)
        self._start = start
        self._bell = bell

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Trajectory:
        return await self.next_by(time.monotonic() + self._timeout_s)

    async def next_by(self, deadline: float) -> Trajectory:
        """See `ClientRound.next_by`; raises `StopAsyncIteration` after the last one."""
        if self._reader is None:
            self._reader = await self._start()
        if self._round is None:
            self._is_waiting = True
            reader = self._reader
            item = await self._bell.wait_for(
                reader.poll, lambda: reader.has_ended, deadline, lambda: self._timed_out(reader)
            )
            self._is_waiting = False
            if isinstance(item, Trajectory):
                return item
            self._round = self._finish(reader, item)
        raise StopAsyncIteration


class ClientGroupStream:
    """Groups in the order in which they were accepted, each once; ends with the prompts, or when it is closed.

    A context manager. Groups that have come and were not taken stay for the next stream.
    """

    def __init__(self, calls: BridgeCalls, reader: StreamReader, bell: Bell, timeout_s: float) -> None:
        self._calls = calls
        self._reader = reader
        self._bell = bell
        self._timeout_s = timeout_s

    @property
    def stream_id(self) -> str:
        """Its name."""
        return self._reader.stream_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Group:
        reader, bound = self._reader, self._timeout_s
        group = self._bell.wait_for(
            reader.poll, lambda: reader.has_ended, time.monotonic() + bound,
            lambda: self._calls.timed_out(reader.describe(), bound),
        )  # fmt: skip
        if group is None:
            raise StopIteration
        return group

    def close(self) -> None:
        """End it, and wait until the service has heard of it; unfinished groups are carried. Safe to call twice."""
        self._reader.close(cancel=True)
        if self._reader.cancelling is not None:
            wait((self._reader.cancelling,), _CLOSE_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_timeout_s"):
            with contextlib.suppress(Exception):
                self._reader.close(cancel=True)


class AsyncClientGroupStream:
    """See `ClientGroupStream`; `async for` over it, `async with` it or `await aclose()`.

    The stream starts when the first group is asked for.
    """

    def __init__(
        self, calls: BridgeCalls, start: Callable[[], Awaitable[StreamReader]], bell: AsyncBell, timeout_s: float
    ) -> None:
        self._calls = calls
        self._reader: StreamReader | None = None
        self._start = start
        self._bell = bell
        self._timeout_s = timeout_s
        self._is_closed = False

    @property
    def stream_id(self) -> str:
        """Its name."""
        if self._reader is None:
            raise RuntimeError("the stream has not been started")
        return self._reader.stream_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Group:
        if self._is_closed:
            raise StopAsyncIteration
        if self._reader is None:
            self._reader = await self._start()
        reader, bound = self._reader, self._timeout_s
        group = await self._bell.wait_for(
            reader.poll, lambda: reader.has_ended, time.monotonic() + bound,
            lambda: self._calls.timed_out(reader.describe(), bound),
        )  # fmt: skip
        if group is None:
            raise StopAsyncIteration
        return group

    async def aclose(self) -> None:
        """See `ClientGroupStream.close`."""
        self._is_closed = True
        if self._reader is not None:
            self._reader.close(cancel=True)
            if self._reader.cancelling is not None:
                await asyncio.wait((asyncio.wrap_future(self._reader.cancelling),), timeout=_CLOSE_TIMEOUT_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if (reader := getattr(self, "_reader", None)) is not None:
            with contextlib.suppress(Exception):
                reader.close(cancel=True)
