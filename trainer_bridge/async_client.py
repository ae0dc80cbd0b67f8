"""`AsyncBridgeClient`: the asyncio counterpart of `client.py`, with the same calls, checks and errors.

No call blocks the event loop but for decoding what has come, and for looking up the user's prompts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from longtail.engine.config import SamplingConfig
from longtail.engine.trajectory import Round, Trajectory
from longtail.trainer_bridge import wire
from longtail.trainer_bridge.client import ClientState
from longtail.trainer_bridge.connection.calls import BridgeCalls, Call, check_timeout
from longtail.trainer_bridge.connection.round_reader import RoundReader, StreamReader
from longtail.trainer_bridge.connection.rounds import AsyncBell, AsyncClientGroupStream, AsyncClientRound
from longtail.trainer_bridge.errors import BridgeError
from longtail.trainer_bridge.keys import ClientKeys

if TYPE_CHECKING:
    from longtail.trainer_bridge.weights.push import PushProgress, PushReport, PushTransport

T = TypeVar("T")


class AsyncBridgeClient(ClientState):
    """See `BridgeClient`, whose arguments it has; `async with` it, which connects."""

    def __init__(
        self,
        address: str,
        *,
        consumer: str = "trainer",
        keys: ClientKeys | None = None,
        cursor: wire.Cursor | None = None,
        prefetch: int = 64,
        connect_timeout_s: float = 60.0,
        timeout_s: float = 600.0,
    ) -> None:
        check_timeout(timeout_s)
        self._connect_timeout_s = check_timeout(connect_timeout_s)
        calls = BridgeCalls(address, consumer=consumer, keys=keys, cursor=cursor, prefetch=prefetch)
        super().__init__(calls, timeout_s)

    async def __aenter__(self) -> Self:
        try:
            await self._run(self._calls.open(), self._connect_timeout_s)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def append_prompts(
        self, prompts: Sequence[Any], *, first: int | None = None, group_size: int = 1, timeout_s: float | None = None
    ) -> int:
        """See `BridgeClient.append_prompts`."""
        return await self._run(self._calls.append_prompts(prompts, first=first, group_size=group_size), timeout_s)

    async def rollout(
        self,
        prompts: Any = None,
        *,
        group_size: int = 1,
        target_groups: int | None = None,
        over_provision: float | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        round_id: str | None = None,
        carry: bool = True,
        on_trajectory: Callable[[Trajectory], None] | None = None,
        timeout_s: float | None = None,
    ) -> Round:
        """See `BridgeClient.rollout`."""
        bound = self._bound(timeout_s)
        deadline = time.monotonic() + bound
        stream = self._start(
            bound, prompts, group_size=group_size, target_groups=target_groups, over_provision=over_provision,
            sampling=sampling, round_id=round_id, carry=carry, preview=on_trajectory is not None,
        )  # fmt: skip
        try:
            while True:
                try:
                    trajectory = await stream.next_by(deadline)
                except StopAsyncIteration:
                    return stream.round
                if on_trajectory is not None:
                    on_trajectory(trajectory)
        except BridgeError:
            stream.leave()
            raise
        except BaseException:
            stream.close()
            raise

    def stream_trajectories(
        self,
        prompts: Any = None,
        *,
        group_size: int = 1,
        target_groups: int | None = None,
        over_provision: float | None = None,
        sampling: SamplingConfig = SamplingConfig(),
        round_id: str | None = None,
        carry: bool = True,
        timeout_s: float | None = None,
    ) -> AsyncClientRound:
        """See `BridgeClient.stream_trajectories`; `async for` over the result."""
        return self._start(
            self._bound(timeout_s), prompts, group_size=group_size, target_groups=target_groups,
            over_provision=over_provision, sampling=sampling, round_id=round_id, carry=carry, preview=True,
        )  # fmt: skip

    def stream(
        self,
        prompts: Any = None,
        *,
        group_size: int = 1,
        num_groups: int = 64,
        sampling: SamplingConfig = SamplingConfig(),
        stream_id: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncClientGroupStream:
        """See `BridgeClient.stream`; `async for` over the result."""
        bell, bound = AsyncBell(), self._bound(timeout_s)

        def start() -> Call[StreamReader]:  # a start whose time is up can be tried again
            return self._calls.start_stream(
                bell.ring, prompts, group_size=group_size, num_groups=num_groups, sampling=sampling,
                stream_id=stream_id,
            )  # fmt: skip

        return AsyncClientGroupStream(self._calls, lambda: self._run(start(), bound), bell, bound)

    async def cancel(self, round_id: str, *, timeout_s: float | None = None) -> None:
        """See `BridgeClient.cancel`."""
        await self._run(self._calls.cancel(round_id), timeout_s)

    async def ack(self, cursor: wire.Cursor | None = None, *, timeout_s: float | None = None) -> None:
        """See `BridgeClient.ack`."""
        await self._run(self._calls.ack(cursor), timeout_s)

    async def push_weights(
        self,
        named_tensors: Iterable[tuple[str, Any]],
        version: int,
        *,
        delta: bool | Literal["auto"] = False,
        transport: PushTransport = "auto",
        init_info: Any = None,
        timeout_s: float | None = None,
        on_progress: Callable[[PushProgress], None] | None = None,
    ) -> PushReport:
        """See `BridgeClient.push_weights`; `named_tensors` is read, and `on_progress` called, in another thread."""
        return await asyncio.to_thread(
            self._push, named_tensors, version, delta=delta, transport=transport, init_info=init_info,
            timeout_s=self._bound(timeout_s), on_progress=on_progress,
        )  # fmt: skip

    async def remember_weights(self, named_tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """See `BridgeClient.remember_weights`; `named_tensors` is read in another thread."""
        await asyncio.to_thread(self._get_pusher().remember, named_tensors, version)

    async def checksum(self, *, timeout_s: float | None = None) -> wire.Checksum:
        """See `BridgeClient.checksum`."""
        return await self._run(self._calls.ask_checksum(), timeout_s)

    async def ask_status(self, *, timeout_s: float | None = None) -> wire.Status:
        """See `BridgeClient.ask_status`."""
        return await self._run(self._calls.ask_status(), timeout_s)

    async def close(self) -> None:
        """See `BridgeClient.close`."""
        await asyncio.to_thread(self._end)

    def _start(self, timeout_s: float, prompts: Any, **arguments: Any) -> AsyncClientRound:
        bell = AsyncBell()

        def start() -> Call[RoundReader]:
            return self._calls.start_round(bell.ring, prompts, **arguments)

        return AsyncClientRound(self._calls, lambda: self._run(start(), timeout_s), bell, timeout_s)

    async def _run(self, call: Call[T], timeout_s: float | None) -> T:
        bound = self._bound(timeout_s)
        deadline = time.monotonic() + bound
        try:
            while True:
                step = next(call)
                future = asyncio.wrap_future(step.future)
                done, _ = await asyncio.wait((future,), timeout=max(deadline - time.monotonic(), 0.0))
                if not done:
                    raise self._calls.timed_out(step.phase, bound)
                future.exception()  # the call asks for it itself
        except StopIteration as returned:
            result: T = returned.value
            return result
        finally:
            call.close()
