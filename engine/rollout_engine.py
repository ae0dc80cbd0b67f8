"""`RolloutEngine` and `AsyncRolloutEngine`: rollouts in a trainer's own process.

Both are thin: they wait for what `EngineDriver` delivers, one with a queue and one with an event loop. Every method
checks its arguments before anything is submitted, and every wait is bounded by the configuration's timeouts.

They are not thread-safe against `close()`, but several rounds may run at once.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from longtail.engine.config import EngineConfig, SamplingConfig
from longtail.engine.driver import EngineDriver
from longtail.engine.prompts import Tokenizer
from longtail.engine.round_run import RPC_TIMEOUT_S, RoundProgress, RoundRun, as_progress
from longtail.engine.trajectory import Round, Trajectory

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

    Item = RequestOutput | Exception

_POLL_S = 1.0
PROGRESS_INTERVAL_S = 0.5


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
            round_id: unique among the engine's live rounds; random by default.
            on_progress: called about twice a second with the scheduler's numbers.

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
        return self._driver.rpc("counters", timeout_s=RPC_TIMEOUT_S)

    def close(self) -> None:
        """Stop the engine. Safe to call twice."""
        self._driver.close()


class RoundStream:
    """Trajectories of one round in the order in which they finish; `round` is there after the last one.

    Leaving the loop early, or an exception in it, cancels the rest of the round.
    """

    def __init__(
        self, driver: EngineDriver, run: RoundRun, on_progress: Callable[[RoundProgress], None] | None
    ) -> None:
        self._driver = driver
        self._run = run
        self._on_progress = on_progress
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._round: Round | None = None
        self._trajectories = self._iterate()
        run.submit(self._items.put)

    @property
    def round(self) -> Round:
        """The whole round.

        Raises:
            RuntimeError: the stream was not read to its end.

        """
        if self._round is None:
            raise RuntimeError("the round is there once its stream was read to the end")
        return self._round

    def __iter__(self) -> Iterator[Trajectory]:
        return self._trajectories

    def _iterate(self) -> Iterator[Trajectory]:
        next_report = time.monotonic()
        try:
            while self._run.collector.num_pending:
                if self._on_progress is not None and time.monotonic() >= next_report:
                    self._on_progress(as_progress(self._run.progress().result(RPC_TIMEOUT_S)))
                    next_report = time.monotonic() + PROGRESS_INTERVAL_S
                try:
                    wait_s = PROGRESS_INTERVAL_S if self._on_progress is not None else _POLL_S
                    item = self._items.get(timeout=wait_s)
                except queue.Empty:
                    self._driver.check_stall()
                    continue
                yield self._run.take(item)
            self._round = self._run.finish().result(RPC_TIMEOUT_S)
        finally:
            self._run.cancel()


class AsyncRolloutEngine:
    """`RolloutEngine` for asyncio; the same arguments, results and errors.

    Start it with `async with AsyncRolloutEngine(config) as engine`, so that the model loads off the event loop.
    """

    def __init__(self, config: EngineConfig | str) -> None:
        self.config = EngineConfig(model=config) if isinstance(config, str) else config
        self._driver: EngineDriver | None = None

    async def __aenter__(self) -> Self:
        self._driver = await asyncio.to_thread(EngineDriver, self.config)
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
        return await asyncio.wrap_future(self._started_driver().call_later(lambda link: link.rpc("counters")))

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
        self._trajectories = self._iterate()
        loop = asyncio.get_running_loop()
        run.submit(lambda item: loop.call_soon_threadsafe(self._items.put_nowait, item))

    @property
    def round(self) -> Round:
        """See `RoundStream.round`."""
        if self._round is None:
            raise RuntimeError("the round is there once its stream was read to the end")
        return self._round

    def __aiter__(self) -> AsyncIterator[Trajectory]:
        return self._trajectories

    async def _iterate(self) -> AsyncIterator[Trajectory]:
        try:
            while self._run.collector.num_pending:
                try:
                    item = await asyncio.wait_for(self._items.get(), _POLL_S)
                except TimeoutError:
                    self._driver.check_stall()
                    continue
                yield self._run.take(item)
            self._round = await asyncio.wait_for(asyncio.wrap_future(self._run.finish()), RPC_TIMEOUT_S)
        finally:
            self._run.cancel()
