"""`RolloutEngine` and `AsyncRolloutEngine`: rollouts in a trainer's own process.

Both are thin: they wait for what `EngineDriver` delivers, one with a queue and one with an event loop. Every method
checks its arguments before anything is submitted, and every wait is bounded by the configuration's timeouts.

They are not thread-safe against `close()`, but several rounds may run at once.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from longtail.engine.config import EngineConfig, SamplingConfig
from longtail.engine.driver import EngineDriver
from longtail.engine.prompts import Tokenizer
from longtail.engine.round_run import RoundProgress, RoundRun, as_progress
from longtail.engine.trajectory import Round, Trajectory

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

    from longtail.engine.core_link import CoreLink

    Item = RequestOutput | Exception

_POLL_S = 0.25
_PROGRESS_S = 0.5


class RolloutEngine:
    """A rollout engine with plain blocking calls. Use it as a context manager.

    Args:
        config: the engine's configuration, or just the model's name.

    Raises:
        ModelSourceError, InvalidInputError, PatchLedgerError, EngineTimeoutError: the engine can't start.

    """

    def __init__(self, config: EngineConfig | str) -> None:
        self.config = EngineConfig(model=config) if isinstance(config, str) else config
        self._driver = EngineDriver(self.config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, `None` when the engine was started without."""
        return self._driver.engine.tokenizer

    @property
    def core_pids(self) -> tuple[int, ...]:
        """Process ids of the engine core; empty when it runs inline."""
        return self._driver.engine.link.pids

    def rollout(
        self,
        prompts: Sequence[Any],
        *,
        group_size: int = 1,
        target_groups: int | None = None,
        over_provision: float | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        round_id: str | None = None,
        on_trajectory: Callable[[Trajectory], None] | None = None,
        on_progress: Callable[[RoundProgress], None] | None = None,
    ) -> Round:
        """Collect one round and return it whole.

        The arguments are those of `stream`; `on_trajectory` is called with each trajectory as it finishes.
        """
        stream = self.stream(
            prompts,
            group_size=group_size,
            target_groups=target_groups,
            over_provision=over_provision,
            sampling=sampling,
            round_id=round_id,
            on_progress=on_progress,
        )
        for trajectory in stream:
            if on_trajectory is not None:
                on_trajectory(trajectory)
        return stream.round

    def stream(
        self,
        prompts: Sequence[Any],
        *,
        group_size: int = 1,
        target_groups: int | None = None,
        over_provision: float | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        round_id: str | None = None,
        on_progress: Callable[[RoundProgress], None] | None = None,
    ) -> RoundStream:
        """Submit one round; iterate over its trajectories as they finish.

        Args:
            prompts: token ids, text, chat messages or `Prompt`s, one a group.
            group_size: samples of each prompt.
            target_groups: end the round when so many groups are complete; all of them by default. Every other
                member is stopped in that very step and returned with what it has, `finish_reason="abort"`.
            over_provision: use the first `ceil(over_provision * target_groups)` prompts only.
            sampling: how every member is sampled.
            round_id: unique among the engine's running rounds; random by default.
            on_progress: called about twice a second with the scheduler's numbers, as far as its steps allow.

        Raises:
            InvalidInputError: an argument is wrong; nothing was submitted.
            EngineDeadError: the engine is dead or closed.

        """
        run = RoundRun(
            self._driver,
            prompts,
            group_size=group_size,
            target_groups=target_groups,
            over_provision=over_provision,
            sampling=sampling,
            round_id=round_id,
        )
        return RoundStream(self._driver, run, on_progress)

    def counters(self) -> dict[str, Any]:
        """The scheduler's counters since start: rounds, cuts, cut members, kept tokens, free blocks, queues."""
        return self._driver.wait(self._driver.call_later(_counters), "the scheduler's counters")

    def close(self) -> None:
        """Stop the engine. Safe to call twice."""
        self._driver.close()


class RoundStream:
    """Trajectories of one round in the order in which they finish; `round` is there after the last one.

    An exception, `close()`, or dropping the stream before its end cancels the rest of the round.
    """

    def __init__(
        self, driver: EngineDriver, run: RoundRun, on_progress: Callable[[RoundProgress], None] | None
    ) -> None:
        self._driver = driver
        self._run = run
        self._on_progress = on_progress
        self._next_progress = time.monotonic()
        self._asked: Future[dict[str, Any]] | None = None
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
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
            if self._run.num_pending:
                return self._run.take(self._wait())
            if self._round is None:
                self._round = self._driver.wait(self._run.finish(), "the round's numbers")
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def close(self) -> None:
        """Cancel what is still running. Safe to call at any time."""
        self._run.cancel()

    def __del__(self) -> None:
        self.close()

    def _wait(self) -> Item:
        while True:
            self._report_progress()
            try:
                return self._items.get(timeout=_POLL_S)
            except queue.Empty:
                self._driver.check_stall()

    def _report_progress(self) -> None:
        if self._on_progress is None:
            return
        if self._asked is None:
            if time.monotonic() >= self._next_progress:
                self._next_progress = time.monotonic() + _PROGRESS_S
                self._asked = self._run.progress()
        elif self._asked.done():
            asked, self._asked = self._asked, None
            self._on_progress(as_progress(asked.result()))


class AsyncRolloutEngine:
    """`RolloutEngine` for asyncio; the same arguments, results and errors.

    Start it with `async with AsyncRolloutEngine(config) as engine`, so that the model loads off the event loop.
    """

    def __init__(self, config: EngineConfig | str) -> None:
        self.config = EngineConfig(model=config) if isinstance(config, str) else config
        self._driver: EngineDriver | None = None

    async def __aenter__(self) -> Self:
        is_left = threading.Event()

        def start() -> None:
            self._driver = EngineDriver(self.config)
            if is_left.is_set():
                self._driver.close()

        try:
            await asyncio.to_thread(start)
        except BaseException:
            is_left.set()
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def rollout(
        self,
        prompts: Sequence[Any],
        *,
        group_size: int = 1,
        target_groups: int | None = None,
        over_provision: float | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        round_id: str | None = None,
    ) -> Round:
        """See `RolloutEngine.rollout`."""
        stream = self.stream(
            prompts,
            group_size=group_size,
            target_groups=target_groups,
            over_provision=over_provision,
            sampling=sampling,
            round_id=round_id,
        )
        async for _ in stream:
            pass
        return stream.round

    def stream(
        self,
        prompts: Sequence[Any],
        *,
        group_size: int = 1,
        target_groups: int | None = None,
        over_provision: float | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        round_id: str | None = None,
    ) -> AsyncRoundStream:
        """See `RolloutEngine.stream`; `async for` over the result."""
        driver = self._started_driver()
        run = RoundRun(
            driver,
            prompts,
            group_size=group_size,
            target_groups=target_groups,
            over_provision=over_provision,
            sampling=sampling,
            round_id=round_id,
        )
        return AsyncRoundStream(driver, run)

    async def counters(self) -> dict[str, Any]:
        """See `RolloutEngine.counters`."""
        return await asyncio.wrap_future(self._started_driver().call_later(_counters))

    async def close(self) -> None:
        """Stop the engine. Safe to call twice."""
        if self._driver is not None:
            await asyncio.to_thread(self._driver.close)

    def _started_driver(self) -> EngineDriver:
        if self._driver is None:
            raise RuntimeError("use it as `async with AsyncRolloutEngine(config) as engine`")
        return self._driver


class AsyncRoundStream:
    """See `RoundStream`."""

    def __init__(self, driver: EngineDriver, run: RoundRun) -> None:
        self._driver = driver
        self._run = run
        self._round: Round | None = None
        self._items: asyncio.Queue[Item] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        run.submit(lambda item: loop.call_soon_threadsafe(self._items.put_nowait, item))

    @property
    def round(self) -> Round:
        """See `RoundStream.round`."""
        return _finished(self._round)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Trajectory:
        try:
            if self._run.num_pending:
                return self._run.take(await self._wait())
            if self._round is None:
                limit = self._driver.config.stall_timeout_s
                self._round = await asyncio.wait_for(asyncio.wrap_future(self._run.finish()), limit)
        except BaseException:
            self.close()
            raise
        raise StopAsyncIteration

    def close(self) -> None:
        """See `RoundStream.close`."""
        self._run.cancel()

    def __del__(self) -> None:
        self.close()

    async def _wait(self) -> Item:
        while True:
            try:
                return await asyncio.wait_for(self._items.get(), _POLL_S)
            except TimeoutError:
                self._driver.check_stall()


def _counters(link: CoreLink) -> dict[str, Any]:
    return link.rpc("counters")


def _finished(round_: Round | None) -> Round:
    if round_ is None:
        raise RuntimeError("the round is there once its stream was read to the end")
    return round_
