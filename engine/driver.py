"""The thread that owns the engine: it steps vLLM while there is work, and runs what others ask it to run.

vLLM's `LLMEngine` belongs to one thread. The driver is that thread; the synchronous and the asyncio facade both talk
to it through a queue and get their results through callbacks, so that they share every line that matters, with the
engine core inline or in its own process. It knows nothing of rounds.

When the core dies, or a step raises, every request in flight and every later call gets an `EngineDeadError`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast

from longtail.engine.config import EngineConfig
from longtail.engine.errors import EngineDeadError, EngineTimeoutError, InvalidInputError
from longtail.engine.launch import StartedEngine, start_engine

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

    from longtail.engine.core_link import CoreLink

T = TypeVar("T")

_logger = logging.getLogger("longtail.engine.driver")

#: Gets a request's final output, or the exception that ended it. Called in the driver's thread: must not block.
Sink = Callable[["RequestOutput | Exception"], object]


class EngineDriver:
    """Starts one engine and drives it until `close()`."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._running_rounds: set[str] = set()
        self._death: EngineDeadError | None = None
        self._phase = "start"
        self._posting = threading.Lock()
        self._closed = False
        self.last_progress = time.monotonic()
        self.weight_version = config.weight_version
        #: Of the segment that the weights came from, if they did.
        self.segment_token: str | None = None
        #: The scheduler is paused beyond one command: a step would wait for ever.
        self.is_paused = False
        self._thread = threading.Thread(target=self._run, name="longtail-engine", daemon=True)
        self._started: Future[StartedEngine] = Future()
        self._thread.start()
        try:
            self.engine = self._started.result(config.start_timeout_s)
        except BaseException as error:
            # Nobody will have a handle to it: should it start after all, it ends at once.
            self._refuse_commands()
            if isinstance(error, FutureTimeoutError) and not self._started.done():
                raise EngineTimeoutError("the engine to start", config.start_timeout_s) from None
            raise

    @property
    def num_in_flight(self) -> int:
        """Requests without a final output."""
        return len(self._sinks)

    def how_it_ended(self) -> str | None:
        """What ended the engine, also where nobody has run into it yet; `None` while it lives."""
        if self._death is not None:
            return str(self._death)
        return "it was closed" if self._closed else self.engine.link.how_it_ended(patience_s=0.0)

    def submit(self, requests: Sequence[tuple[str, list[int], Any]], sink: Sink) -> None:
        """Submit `(request_id, prompt_token_ids, sampling_params)` requests; each sends one item to `sink`.

        Raises:
            EngineDeadError: the engine is dead or closed.

        """
        self._post(lambda: self._add(requests, sink))

    def claim_round(self, round_id: str) -> None:
        """Reserve a round id until `release_round`.

        Raises:
            InvalidInputError: a running round has it.

        """
        if round_id in self._running_rounds:
            raise InvalidInputError("round_id", "an id that no running round has", round_id)
        self._running_rounds.add(round_id)

    def release_round(self, round_id: str) -> None:
        """Let the id be used again; unknown ids are ignored."""
        self._running_rounds.discard(round_id)

    def call_later(self, function: Callable[[CoreLink], T]) -> Future[T]:
        """Run `function` in the driver's thread, between two steps.

        Raises:
            EngineDeadError: the engine is dead or closed; the future raises it where it dies meanwhile.

        """
        future: Future[T] = Future()

        def run() -> None:
            # Whoever waited for it may have left: asyncio cancels it then.
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._death is not None:
                    raise self._death
                result = function(self.engine.link)
            except Exception as error:
                future.set_exception(self._translate(error))
            else:
                future.set_result(result)

        self._post(run)
        return future

    def wait(self, future: Future[T], what: str) -> T:
        """The result of `call_later`, which may take as long as a step.

        Raises:
            EngineTimeoutError: it took longer than `stall_timeout_s`.

        """
        limit = self.config.stall_timeout_s
        try:
            return future.result(limit)
        except FutureTimeoutError:
            if future.done():
                raise
            raise EngineTimeoutError(what, limit) from None

    def abandon(self, request_ids: Iterable[str]) -> None:
        """Abort what is in flight of these; nothing of them reaches a sink any more. In the driver's thread only."""
        if in_flight := [one for one in request_ids if self._sinks.pop(one, None) is not None]:
            self.engine.llm_engine.abort_request(in_flight)

    @property
    def is_given_up(self) -> bool:
        """The engine is dead, or nothing may run on it any more."""
        return self._death is not None

    def give_up(self, phase: str, error: BaseException) -> None:
        """End everything in flight, and refuse what comes: the engine must not go on. In the driver's thread."""
        self._phase = phase
        self._fail_all(self._died(error))

    def drain(self) -> None:
        """With the scheduler paused, in the driver's thread: finish the steps in flight, whose tokens are delivered."""
        while self.engine.link.has_step_in_flight:
            self._step()

    def check_stall(self) -> None:
        """Raise if requests are in flight and the engine has made no step for `stall_timeout_s`."""
        limit = self.config.stall_timeout_s
        if self._sinks and time.monotonic() - self.last_progress > limit:
            raise EngineTimeoutError("the engine core to finish a step", limit)

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop the engine; requests in flight get an `EngineDeadError`. Safe to call twice."""
        if self._closed:
            return
        self._refuse_commands()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise EngineTimeoutError("the engine to shut down", timeout_s)

    # ---- in the driver's thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine = start_engine(self.config)
        except BaseException as error:
            self._started.set_exception(error)
            return
        self.engine = engine
        self._started.set_result(engine)
        self._phase = "rollout"
        try:
            while self._run_commands(block=not self._sinks or self.is_paused):
                if self._sinks and not self.is_paused:
                    self._step()
            self._end(EngineDeadError("shutdown", "it was closed", len(self._sinks)))
        except BaseException as error:
            _logger.exception("longtail's driver failed; this is a bug")
            self._end(self._died(error))
        finally:
            engine.shutdown()

    def _end(self, death: EngineDeadError) -> None:
        """Answer everything that waits, and everything that may still be posted, with `death`."""
        with self._posting:
            self._death = death
        self._fail_all(death)
        with suppress(queue.Empty):
            while True:
                if (command := self._commands.get_nowait()) is not None:
                    command()

    def _run_commands(self, block: bool) -> bool:
        """Run what is queued; with `block` wait for the first. False once the driver is to end."""
        while True:
            try:
                command = self._commands.get(block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = False
            self.last_progress = time.monotonic()

    def _add(self, requests: Sequence[tuple[str, list[int], Any]], sink: Sink) -> None:
        for request_id, token_ids, params in requests:
            if self._death is not None:
                _deliver(sink, self._death)
                continue
            try:
                self.engine.llm_engine.add_request(request_id, {"prompt_token_ids": token_ids}, params)
            except Exception as error:
                _deliver(sink, self._translate(error))
            else:
                self._sinks[request_id] = sink

    def _step(self) -> None:
        try:
            outputs = self.engine.llm_engine.step()
        except Exception as error:
            death = self._translate(error)
            self._fail_all(death if isinstance(death, EngineDeadError) else self._died(error))
            return
        self.last_progress = time.monotonic()
        for output in cast("list[RequestOutput]", outputs):
            if output.finished and (sink := self._sinks.pop(output.request_id, None)) is not None:
                _deliver(sink, output)

    def _translate(self, error: Exception) -> Exception:
        from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

        return self._died(error) if isinstance(error, VllmEngineDeadError) else error

    def _died(self, error: BaseException) -> EngineDeadError:
        if self._death is None:
            cause = self.engine.link.how_it_ended() or f"{type(error).__name__}: {error}"
            self._death = EngineDeadError(self._phase, cause, len(self._sinks))
            self._death.__cause__ = error
        return self._death

    def _fail_all(self, error: Exception) -> None:
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            _deliver(sink, error)

    # ---- in any thread -----------------------------------------------------------------------------------------

    def _post(self, command: Callable[[], None]) -> None:
        # A command that is in the queue is run: none may come after the one that ends the driver.
        with self._posting:
            if self._death is not None:
                raise self._death
            if self._closed:
                raise EngineDeadError("shutdown", "it was closed")
            self._commands.put(command)

    def _refuse_commands(self) -> None:
        """End the driver once it has run what was posted."""
        with self._posting:
            self._closed = True
            self._commands.put(None)


def _deliver(sink: Sink, item: RequestOutput | Exception) -> None:
    """A sink that raises, as one of an event loop that is closed by now does, must not end every other request."""
    try:
        sink(item)
    except Exception:
        _logger.warning("an output finds nobody to take it", exc_info=True)
