"""`AsyncRolloutEngine`: rollouts for asyncio."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from longtail.engine.config import EngineConfig, SamplingConfig
from longtail.engine.errors import WeightsHookError
from longtail.engine.hook_points import HookPoints
from longtail.engine.prompts import Tokenizer
from longtail.engine.rollout_engine import EngineAndBook
from longtail.engine.round_stream import AsyncGroupStream, AsyncRoundStream
from longtail.engine.trajectory import Round, Trajectory
from longtail.engine.weights import ControlOp


class AsyncRolloutEngine:
    """`RolloutEngine` for asyncio: the same arguments, results and errors, but no `on_progress`.

    Start it with `async with AsyncRolloutEngine(config) as engine`, so that the model loads off the event loop.
    """

    def __init__(self, config: EngineConfig | str, hooks: HookPoints | None = None) -> None:
        self.config = EngineConfig(model=config) if isinstance(config, str) else config
        self._hooks = hooks
        self._started: EngineAndBook | None = None

    async def __aenter__(self) -> Self:
        is_left = threading.Event()

        def start() -> None:
            self._started = EngineAndBook(self.config, self._hooks)
            if is_left.is_set():
                self._started.close()

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

    @property
    def tokenizer(self) -> Tokenizer | None:
        """See `RolloutEngine.tokenizer`."""
        return self._engine.driver.engine.tokenizer

    @property
    def core_pids(self) -> tuple[int, ...]:
        """See `RolloutEngine.core_pids`."""
        return self._engine.driver.engine.link.pids

    @property
    def weight_version(self) -> int:
        """See `RolloutEngine.weight_version`."""
        return self._engine.driver.weight_version

    async def rollout(
        self,
        prompts: Any,
        *,
        group_size: int = 1,
        target_groups: int | None = None,
        over_provision: float | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        round_id: str | None = None,
        carry: bool = True,
        on_trajectory: Callable[[Trajectory], None] | None = None,
    ) -> Round:
        """See `RolloutEngine.rollout`."""
        stream = self.stream_trajectories(
            prompts,
            group_size=group_size,
            target_groups=target_groups,
            over_provision=over_provision,
            sampling=sampling,
            round_id=round_id,
            carry=carry,
        )
        async for trajectory in stream:
            if on_trajectory is not None:
                on_trajectory(trajectory)
        return stream.round

    def stream_trajectories(
        self,
        prompts: Any,
        *,
        group_size: int = 1,
        target_groups: int | None = None,
        over_provision: float | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        round_id: str | None = None,
        carry: bool = True,
        can_fork: bool = False,
    ) -> AsyncRoundStream:
        """See `RolloutEngine.stream_trajectories`; `async for` over the result."""
        engine = self._engine
        run = engine.run(
            prompts,
            group_size=group_size,
            target_groups=target_groups,
            over_provision=over_provision,
            sampling=sampling,
            round_id=round_id,
            carry=carry,
            can_fork=can_fork,
        )
        return AsyncRoundStream(engine.driver, run)

    def stream(
        self,
        prompts: Any,
        *,
        group_size: int = 1,
        num_groups: int = 64,
        sampling: SamplingConfig = SamplingConfig(),
        can_fork: bool = False,
    ) -> AsyncGroupStream:
        """See `RolloutEngine.stream`; `async for` over the result."""
        engine = self._engine
        run = engine.stream(prompts, group_size=group_size, num_groups=num_groups, sampling=sampling, can_fork=can_fork)
        return AsyncGroupStream(engine.driver, run)

    async def load_weights(self, checkpoint: str | os.PathLike[str], version: int | None = None) -> int:
        """See `RolloutEngine.load_weights`."""
        return await self._change_weights(version, checkpoint)

    async def declare_weights(self, version: int | None = None) -> int:
        """See `RolloutEngine.declare_weights`."""
        return await self._change_weights(version, None)

    async def update_weights(self, update_info: Mapping[str, Any], version: int, *, may_repeat: bool = False) -> float:
        """See `RolloutEngine.update_weights`."""
        pause_s = await asyncio.wrap_future(self._engine.update_weights(update_info, version, may_repeat=may_repeat))
        try:
            await asyncio.wrap_future(self._engine.tell_hooks(version))
        except Exception as error:
            raise WeightsHookError(version, pause_s, error) from error
        return pause_s

    async def control_weights(
        self, op: ControlOp, info: Mapping[str, Any], version: int | None = None, *, may_repeat: bool = False
    ) -> None:
        """See `RolloutEngine.control_weights`."""
        await asyncio.wrap_future(self._engine.control_weights(op, info, version, may_repeat=may_repeat))
        if op == "finish":
            await asyncio.wrap_future(self._engine.tell_hooks(self.weight_version))

    async def weights_checksum(self) -> str:
        """See `RolloutEngine.weights_checksum`."""
        return await asyncio.wrap_future(self._engine.weights_checksum())

    async def counters(self) -> dict[str, Any]:
        """See `RolloutEngine.counters`."""
        return await asyncio.wrap_future(self._engine.counters())

    async def close(self) -> None:
        """Stop the engine. Safe to call twice."""
        if self._started is not None:
            await asyncio.to_thread(self._started.close)

    async def _change_weights(self, version: int | None, checkpoint: str | os.PathLike[str] | None) -> int:
        new = await asyncio.wrap_future(self._engine.change_weights(version, checkpoint))
        await asyncio.wrap_future(self._engine.tell_hooks(new))
        return new

    @property
    def _engine(self) -> EngineAndBook:
        if self._started is None:
            raise RuntimeError("use it as `async with AsyncRolloutEngine(config) as engine`")
        return self._started
