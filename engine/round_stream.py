"""What a running round looks like to its caller: an iterator over trajectories, or over groups, blocking or asyncio.

An iterator takes the items that engine and hooks deliver, one by one, in its caller's thread or event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import time
from collections import deque
from collections.abc import Callable, MutableSequence, Sequence
from concurrent.futures import Future
from typing import Any, Self

from longtail.engine.carry_run import CarryRun
from longtail.engine.driver import EngineDriver
from longtail.engine.errors import EngineTimeoutError, InvalidInputError
from longtail.engine.round_run import RoundProgress, RoundRun, as_progress
from longtail.engine.trajectory import Group, Round, Trajectory

_POLL_S = 0.25
_PROGRESS_S = 0.5
#: How long a stream that is closed waits for the tokens of its members.
_CLOSE_TIMEOUT_S = 30.0
#: Item of a stream that is to end.
_STOP = object()


class RoundStream:
    """Trajectories of one round in the order in which they finish; `round` is there after the last one.

    Of a round that carries over, only those that ended by themselves. An exception, `close()`, or dropping the stream
    before its end cancels the rest of the round.
    """

    def __init__(
        self,
        driver: EngineDriver,
        run: RoundRun | CarryRun,
        on_progress: Callable[[RoundProgress], None] | None,
    ) -> None:
        self._driver = driver
        self._run = run
        self._on_progress = on_progress
        self._next_progress = time.monotonic()
        self._asked: Future[dict[str, Any]] | None = None
        self._items = _Items(driver)
        self._ended: deque[Trajectory] = deque()
        self._round: Round | None = None
        run.submit(self._items.put)

    @property
    def round(self) -> Round:
        """The whole round.

        Raises:
            RuntimeError: the stream was not read to its end.

        """
        return _finished(self._round)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Trajectory:
        try:
            while not self._ended and self._round is None:
                if self._run.settle():
                    self._round = self._driver.wait(self._run.finish(), "the round's numbers")
                else:
                    self._ended.extend(self._run.take(self._items.get(self._report_progress)))
            if self._ended:
                return self._ended.popleft()
            self._run.received()
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def fork(
        self, trajectory_id: str, *, at: int | None = None, n: int = 1, seeds: Sequence[int] | None = None
    ) -> list[str]:
        """Branch a trajectory of the round: `n` more members of its group go on from its tokens. In your thread.

        Nothing is computed again as long as the KV of those tokens is there, but the last one, once a branch: what is
        sampled after it is the branch's own.

        Args:
            trajectory_id: of one that runs, or that ended or was cut and whose group is not complete. Ids are
                `<round_id>/<group_id>/<index>`, or see `Trajectory.trajectory_id`.
            at: how many of its output tokens a branch begins with, fewer than it has for a rewind; by default all that
                there are now.
            n: number of branches.
            seeds: of the branches; by default they follow from the trajectory's, if it has one. Without a seed of its
                own a branch draws from the engine's stream.

        Returns:
            Ids of the branches, whose `Trajectory.branch` says where they left.

        Raises:
            InvalidInputError: names the argument; there is no such trajectory, or nothing to sample after `at`.
            EngineDeadError, EngineTimeoutError: as for the round.

        """
        return _fork(self, self._ended, trajectory_id, at, n, seeds)

    def close(self) -> None:
        """Cancel what is still running. Safe to call at any time."""
        self._run.cancel()

    def interrupt(self, error: Exception) -> None:
        """Make whoever iterates cancel the round and raise `error`. In any thread; nothing once the round is over."""
        self._items.put(error)

    def __del__(self) -> None:
        if hasattr(self, "_run"):
            self.close()

    def _report_progress(self) -> None:
        if self._on_progress is None:
            return
        if self._asked is None:
            if time.monotonic() >= self._next_progress:
                self._next_progress = time.monotonic() + _PROGRESS_S
                self._asked = self._run.progress()
        elif self._asked.done():
            asked, self._asked = self._asked, None
            with contextlib.suppress(InvalidInputError):  # none of its members has arrived yet
                self._on_progress(as_progress(asked.result()))


class GroupStream:
    """Groups in the order in which they are complete and accepted, without rounds; ends with the prompts.

    A group counts as received when the next one is asked for, or the stream is closed: after a crash, one that was not
    is given again. `close()` cuts what runs, and keeps it for the next round or stream.
    """

    def __init__(self, driver: EngineDriver, run: CarryRun) -> None:
        self._driver = driver
        self._run = run
        self._items = _Items(driver)
        self._given: int | None = None
        run.submit(self._items.put)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Group:
        if self._run.has_ended:
            raise StopIteration
        try:
            if (group := _next_ready(self)) is not None:
                return group
            while not self._run.settle():
                if (item := self._items.get()) is _STOP:
                    self._run.stop()
                else:
                    self._run.take(item)
                if (group := _next_ready(self)) is not None:
                    return group
        except BaseException:
            self._run.cancel()
            raise
        self._run.end()
        raise StopIteration

    def fork(
        self, trajectory_id: str, *, at: int | None = None, n: int = 1, seeds: Sequence[int] | None = None
    ) -> list[str]:
        """See `RoundStream.fork`."""
        return _fork(self, [], trajectory_id, at, n, seeds)

    def stop(self) -> None:
        """Cut what runs and keep it; whoever iterates gets what is complete, then the end. In any thread."""
        self._items.put(_STOP)

    def close(self) -> None:
        """Cut what runs, wait until its tokens are here, and keep them. Safe to call twice."""
        if self._run.has_ended:
            return
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        try:
            self._run.stop()
            _acknowledge(self)
            while self._run.is_stopping and time.monotonic() < deadline:
                if (item := self._items.get()) is not _STOP:
                    self._run.take(item)
            if not self._run.is_stopping:
                self._run.end()
        finally:
            self._run.cancel()

    @property
    def filtered_reasons(self) -> dict[str, int]:
        """How many groups were refused so far, by reason."""
        return self._run.filtered_reasons

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_run"):
            self._run.cancel()


class AsyncRoundStream:
    """See `RoundStream`."""

    def __init__(self, driver: EngineDriver, run: RoundRun | CarryRun) -> None:
        self._run = run
        self._driver = driver
        self._round: Round | None = None
        self._items = _AsyncItems(driver)
        self._forking = asyncio.Lock()
        self._ended: deque[Trajectory] = deque()
        run.submit(self._items.put)

    @property
    def round(self) -> Round:
        """See `RoundStream.round`."""
        return _finished(self._round)

    def __aiter__(self) -> Self:
        return self

    async def fork(
        self, trajectory_id: str, *, at: int | None = None, n: int = 1, seeds: Sequence[int] | None = None
    ) -> list[str]:
        """See `RoundStream.fork`."""
        return await _fork_async(self, self._ended, trajectory_id, at, n, seeds)

    async def __anext__(self) -> Trajectory:
        try:
            while not self._ended and self._round is None:
                if self._run.settle():
                    limit = self._driver.config.stall_timeout_s
                    self._round = await asyncio.wait_for(asyncio.wrap_future(self._run.finish()), limit)
                else:
                    self._ended.extend(await self._items.take(self._run.take))
            if self._ended:
                return self._ended.popleft()
            self._run.received()
        except BaseException:
            self.close()
            raise
        self._items.wake()
        raise StopAsyncIteration

    def close(self) -> None:
        """See `RoundStream.close`."""
        self._run.cancel()
        self._items.wake()

    def __del__(self) -> None:
        if hasattr(self, "_run"):
            self.close()


class AsyncGroupStream:
    """See `GroupStream`; `async with` it, or `await aclose()`, to keep what runs when you stop early."""

    def __init__(self, driver: EngineDriver, run: CarryRun) -> None:
        self._driver = driver
        self._run = run
        self._items = _AsyncItems(driver)
        self._forking = asyncio.Lock()
        self._given: int | None = None
        run.submit(self._items.put)

    def __aiter__(self) -> Self:
        return self

    async def fork(
        self, trajectory_id: str, *, at: int | None = None, n: int = 1, seeds: Sequence[int] | None = None
    ) -> list[str]:
        """See `RoundStream.fork`."""
        return await _fork_async(self, [], trajectory_id, at, n, seeds)

    async def __anext__(self) -> Group:
        if self._run.has_ended:
            raise StopAsyncIteration
        try:
            if (group := _next_ready(self)) is not None:
                return group
            while not self._run.settle():
                await self._items.take(self._run.take)
                if (group := _next_ready(self)) is not None:
                    return group
        except BaseException:
            self._cancel()
            raise
        self._run.end()
        self._items.wake()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """See `GroupStream.close`."""
        if self._run.has_ended:
            return
        try:
            self._run.stop()
            _acknowledge(self)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    while self._run.is_stopping:
                        await self._items.take(self._run.take)
                    self._run.end()
        finally:
            self._cancel()

    @property
    def filtered_reasons(self) -> dict[str, int]:
        """See `GroupStream.filtered_reasons`."""
        return self._run.filtered_reasons

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if hasattr(self, "_run"):
            self._cancel()

    def _cancel(self) -> None:
        self._run.cancel()
        self._items.wake()


class _Items:
    """Items of other threads for one that waits for them."""

    def __init__(self, driver: EngineDriver) -> None:
        self._driver = driver
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def put(self, item: Any) -> None:
        self._items.put(item)

    def get(self, meanwhile: Callable[[], None] | None = None) -> Any:
        while True:
            if meanwhile is not None:
                meanwhile()
            try:
                return self._items.get(timeout=_POLL_S)
            except queue.Empty:
                self._driver.check_stall()


class _AsyncItems:
    """Items of other threads for the tasks of one event loop: one iterates, another may fork."""

    def __init__(self, driver: EngineDriver) -> None:
        self._driver = driver
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._reading = asyncio.Lock()
        self._num_taken = 0

    def put(self, item: Any) -> None:
        self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    def wake(self) -> None:
        """Let a task look again that waits for an item: the run is over."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and so nobody waits
            self.put(None)

    async def take(self, take: Callable[[Any], list[Trajectory]]) -> list[Trajectory]:
        """`take` the next item; nothing if another task took one meanwhile, after which to look again."""
        before = self._num_taken
        async with self._reading:
            if self._num_taken != before:
                return []
            item = await self._get()
            self._num_taken += 1
            return take(item)

    async def _get(self) -> Any:
        while True:
            try:
                return await asyncio.wait_for(self._items.get(), _POLL_S)
            except TimeoutError:
                self._driver.check_stall()


def _fork(
    stream: RoundStream | GroupStream, ended: MutableSequence[Trajectory], trajectory_id: str, *args: Any
) -> list[str]:
    """Fork a trajectory; what ends meanwhile is added to `ended`."""
    run = stream._run
    while (fork := run.ask_fork(trajectory_id, *args)) is None:
        ended.extend(_taken(run, stream._items.get()))
    try:
        while True:
            answer = fork.answer
            with contextlib.suppress(InvalidInputError):  # `take_fork` knows what it means
                stream._driver.wait(answer, "the scheduler to fork")
            if (ids := run.take_fork(fork)) is not None:
                return ids
            if fork.answer is answer:
                ended.extend(_taken(run, stream._items.get()))
    finally:
        run.end_fork(fork)


async def _fork_async(
    stream: AsyncRoundStream | AsyncGroupStream, ended: MutableSequence[Trajectory], trajectory_id: str, *args: Any
) -> list[str]:
    run = stream._run
    limit = stream._driver.config.stall_timeout_s
    async with stream._forking:
        while (fork := run.ask_fork(trajectory_id, *args)) is None:
            ended.extend(await stream._items.take(functools.partial(_taken, run)))
        try:
            while True:
                answer = fork.answer
                try:
                    await asyncio.wait_for(asyncio.wrap_future(answer), limit)
                except InvalidInputError:
                    pass
                except TimeoutError:
                    raise EngineTimeoutError("the scheduler to fork", limit) from None
                if (ids := run.take_fork(fork)) is not None:
                    return ids
                if fork.answer is answer:
                    ended.extend(await stream._items.take(functools.partial(_taken, run)))
        finally:
            run.end_fork(fork)


def _taken(run: RoundRun | CarryRun, item: Any) -> list[Trajectory]:
    """What an item ends; whatever it raises ends the run."""
    try:
        if item is not _STOP:
            return run.take(item)
        assert isinstance(run, CarryRun)
        run.stop()
    except BaseException:
        run.cancel()
        raise
    return []


def _next_ready(stream: GroupStream | AsyncGroupStream) -> Group | None:
    """The next group to give; the one before is received now."""
    _acknowledge(stream)
    for serial, group in stream._run.ready_groups().items():
        stream._given = serial
        return group
    return None


def _acknowledge(stream: GroupStream | AsyncGroupStream) -> None:
    """The caller goes on, so it has the group that it was given."""
    if stream._given is not None:
        stream._run.taken(stream._given)
        stream._given = None


def _finished(round_: Round | None) -> Round:
    if round_ is None:
        raise RuntimeError("the round is there once its stream was read to the end")
    return round_
