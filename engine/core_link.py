"""The link to the engine core: scheduler RPC, and the news of its death.

vLLM's synchronous client waits without a bound: when the core process is killed, `get_output()` and a pending
utility call never return. `CoreLink` watches the core's processes and wakes both with vLLM's `EngineDeadError`.
"""

from __future__ import annotations

import multiprocessing.connection
import signal
import threading
import time
from typing import Any

from longtail.scheduler.errors import InvalidInputError

_POLL_S = 0.01


class CoreLink:
    """Wraps the `engine_core` client of an `LLMEngine`, inline or with a core process."""

    def __init__(self, client: Any) -> None:
        self._client: Any = client
        self._inline_core: Any = getattr(client, "engine_core", None)
        self._closing = threading.Event()
        if self._inline_core is None:
            self._processes = list(self._client.resources.engine_manager.processes)
            threading.Thread(target=self._watch, name="longtail-core-watch", daemon=True).start()
        else:
            self._processes = []
        self.pids = tuple(process.pid for process in self._processes)

    @property
    def is_inline(self) -> bool:
        """The core runs in this process."""
        return self._inline_core is not None

    @property
    def has_step_in_flight(self) -> bool:
        """An inline core with asynchronous scheduling has a step whose tokens nobody has seen."""
        return bool(getattr(self._inline_core, "batch_queue", None))

    def how_it_ended(self, patience_s: float = 1.0) -> str | None:
        """What ended a core process, as the operating system has it; `None` if all run, or none was started.

        News of a death may be here before its exit code, which another thread may be fetching: it is waited for.
        """
        deadline = time.monotonic() + patience_s
        while self._processes:
            for process in self._processes:
                if (code := process.exitcode) is not None:
                    end = f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
                    return f"process {process.pid}: {end}"
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        return None

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of `EngineCore` between two steps.

        Raises:
            vllm.v1.engine.exceptions.EngineDeadError: the core died meanwhile.

        """
        if self._inline_core is not None:
            return getattr(self._inline_core, method)(*args)
        return self._client.call_utility(method, *args)

    def rpc(self, op: str, **args: Any) -> dict[str, Any]:
        """Call `rollout_rpc` of the scheduler.

        Raises:
            InvalidInputError: the scheduler refused the arguments.

        """
        answer: dict[str, Any] = self.call("rollout_rpc", op, args)
        return checked_answer(answer)

    def close(self) -> None:
        """Expect the core to end from now on."""
        self._closing.set()

    def join(self, timeout_s: float = 5.0) -> None:
        """Wait until the core's processes are gone: vLLM kills a slow one and does not wait for its end."""
        for process in self._processes:
            process.join(timeout_s)

    def _watch(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        multiprocessing.connection.wait([process.sentinel for process in self._processes])
        if self._closing.is_set():
            return
        self._client.resources.engine_dead = True
        for future in list(self._client.utility_results.values()):
            if not future.done():
                future.set_exception(EngineDeadError())
        self._client.outputs_queue.put(EngineDeadError())


def checked_answer(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer of `rollout_rpc`, or the typed error that it carries.

    Raises:
        InvalidInputError: the scheduler refused the arguments.

    """
    if (invalid := answer.get("invalid")) is not None:
        raise InvalidInputError(*invalid)
    return answer
