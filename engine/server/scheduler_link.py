"""The scheduler as the HTTP server reaches it: `rollout_rpc` through vLLM's asyncio client, with a bound on every wait.

vLLM's client neither bounds a call nor ends it when the core process dies.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from longtail.engine.core_link import checked_answer
from longtail.engine.errors import EngineDeadError, EngineTimeoutError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

RPC_TIMEOUT_S = 60.0
_DEATH_POLL_S = 0.5


class SchedulerLink:
    """Calls the scheduler between two steps."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine

    async def rpc(self, op: str, *, timeout_s: float = RPC_TIMEOUT_S, **args: Any) -> dict[str, Any]:
        """Call `rollout_rpc(op, args)`; see `RolloutMixin.rollout_rpc`.

        Raises:
            InvalidInputError: the scheduler refused the arguments.
            EngineDeadError: the core is dead, or died meanwhile.
            EngineTimeoutError: no answer within `timeout_s`.

        """
        answer: dict[str, Any] = await self.call("rollout_rpc", op, args, timeout_s=timeout_s)
        return checked_answer(answer)

    async def call(self, method: str, *args: Any, timeout_s: float = RPC_TIMEOUT_S) -> Any:
        """Call a method of `EngineCore`; raises as `rpc` does, and what the method itself raised as `Exception`."""
        from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

        if self.is_dead:
            raise core_ended()
        call = asyncio.ensure_future(self._engine.engine_core.call_utility_async(method, *args))
        try:
            loop = asyncio.get_running_loop()
            deadline = loop.time() + timeout_s
            while not call.done():
                left_s = deadline - loop.time()
                if left_s <= 0:
                    what = "/".join([method, *(str(arg) for arg in args[:1])])
                    raise EngineTimeoutError(f"the engine core's answer to {what}", timeout_s)
                await asyncio.wait([call], timeout=min(_DEATH_POLL_S, left_s))
                if not call.done() and self.is_dead:
                    raise core_ended()
            return call.result()
        except VllmEngineDeadError as error:
            raise core_ended() from error
        finally:
            call.cancel()

    @property
    def is_dead(self) -> bool:
        """The core stopped, for whatever reason."""
        return bool(self._engine.errored)


def core_ended(num_in_flight: int = 0) -> EngineDeadError:
    """The error for whoever needs a core that is gone, or was told to go."""
    return EngineDeadError("rollout", "its process ended or was told to", num_in_flight)
