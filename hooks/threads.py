"""Where hooks run: plain functions in threads, coroutine functions in one event loop, each for a limited time.

Threads are daemons, so none keeps the process alive. A thread cannot be killed: one whose call is late is left alone
and replaced, and so is an event loop that a coroutine function blocks. How many of either may be in that state is
bounded.
Threads that a hook starts itself, by `asyncio.to_thread` for instance, are its own affair.

`HookThreads` belongs to the runner's event loop, which runs no code of a hook: it needs no locks.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

from longtail.hooks.binding import HookCall
from longtail.hooks.loop_thread import LoopThread

#: An event loop that has not cancelled a late call by then is blocked.
BLOCKED_AFTER_S = 1.0


class NoThreadLeft(Exception):
    """The bound on stuck threads is reached; says who holds them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended: with a value, with an error, or not in time; `seconds` is how long it had a thread."""

    value: Any = None
    error: BaseException | None = None
    late: bool = False
    seconds: float = 0.0


class HookThreads:
    """Runs calls, each to its end or to its time limit. `run` may be called from the runner's loop only."""

    def __init__(self, max_threads: int, max_stuck: int) -> None:
        self._max_stuck = max_stuck
        self._slots = asyncio.Semaphore(max_threads)
        self._idle: list[_WorkerThread] = []
        self._workers: set[_WorkerThread] = set()
        self._current_loop: LoopThread | None = None
        self._loops: set[LoopThread] = set()
        self._watches: dict[LoopThread, asyncio.Task[None]] = {}
        self._stuck: dict[_WorkerThread | LoopThread, str] = {}

    @property
    def num_stuck(self) -> int:
        """Threads that a call holds past its limit. From any thread."""
        return len(self._stuck)

    async def run(self, call: HookCall, argument: object) -> Outcome:
        """Call it; waiting for a free thread does not count towards its limit.

        Raises:
            NoThreadLeft: it would need a thread, and too many are stuck.

        """
        return await (self._run_async(call, argument) if call.is_async else self._run_sync(call, argument))

    def stop(self, deadline: float) -> None:
        """Cancel or leave what runs; wait for it until `deadline`, for stuck threads not at all. From any thread."""
        workers, stuck = self._workers.copy(), self._stuck.copy()
        for loop_thread in self._loops.copy():
            loop_thread.stop(time.monotonic() if loop_thread in stuck else deadline)
        for worker in workers:
            worker.stop()
        for worker in workers - stuck.keys():
            worker.join(deadline)

    # ---- plain functions -----------------------------------------------------------------------------------------

    async def _run_sync(self, call: HookCall, argument: object) -> Outcome:
        async with self._slots:
            self._check_room(_WorkerThread)
            worker = self._idle.pop() if self._idle else self._start_worker()
            began = time.monotonic()
            answer = worker.start(call.function, argument)
            await asyncio.wait((answer,), timeout=call.time_limit_s)
            seconds = time.monotonic() - began
            if answer.done():
                self._idle.append(worker)
                return replace(answer.result(), seconds=seconds)
            self._stuck[worker] = f"{call.point} of {call.hook}"
            answer.add_done_callback(lambda _: self._end_worker(worker))
            return Outcome(late=True, seconds=seconds)

    def _start_worker(self) -> _WorkerThread:
        worker = _WorkerThread(asyncio.get_running_loop())
        self._workers.add(worker)
        return worker

    def _end_worker(self, worker: _WorkerThread) -> None:
        """A stuck thread came back; others took its place."""
        del self._stuck[worker]
        self._workers.remove(worker)
        worker.stop()

    def _check_room(self, kind: type[_WorkerThread | LoopThread]) -> None:
        held_by = [holder for thread, holder in self._stuck.items() if isinstance(thread, kind)]
        if len(held_by) >= self._max_stuck:
            holders = ", ".join(sorted(set(held_by)))
            raise NoThreadLeft(f"not called, because {len(held_by)} threads (the bound) are stuck in {holders}")

    # ---- coroutine functions -------------------------------------------------------------------------------------

    async def _run_async(self, call: HookCall, argument: object) -> Outcome:
        loop_thread = self._current_loop or self._start_loop()
        began = time.monotonic()
        running = asyncio.run_coroutine_threadsafe(_awaited(call.function, argument), loop_thread.loop)
        answer = asyncio.wrap_future(running)
        try:
            await asyncio.wait((answer,), timeout=call.time_limit_s)
        finally:
            late = not answer.done()
            if late:
                answer.cancel()
        seconds = time.monotonic() - began
        if not late:
            # A hook may cancel every task of the loop; no task of ours is meant to end that way.
            outcome = Outcome(error=asyncio.CancelledError()) if answer.cancelled() else answer.result()
            return replace(outcome, seconds=seconds)
        if loop_thread is self._current_loop and loop_thread not in self._watches:
            self._watches[loop_thread] = asyncio.create_task(self._replace_if_blocked(loop_thread))
        return Outcome(late=True, seconds=seconds)

    def _start_loop(self) -> LoopThread:
        self._check_room(LoopThread)
        self._current_loop = LoopThread("longtail-async-hooks")
        self._loops.add(self._current_loop)
        return self._current_loop

    async def _replace_if_blocked(self, loop_thread: LoopThread) -> None:
        alive = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop_thread.loop))
        try:
            await asyncio.wait((alive,), timeout=BLOCKED_AFTER_S)
            if alive.done():
                return
            self._current_loop = None
            self._stuck[loop_thread] = "a coroutine function that blocks the event loop"
            await asyncio.wait((alive,))
            del self._stuck[loop_thread]
            self._loops.remove(loop_thread)
            # What still runs in it may end in its time.
            loop_thread.stop_when_idle()
        finally:
            del self._watches[loop_thread]
            alive.cancel()


class _WorkerThread:
    """Runs one plain function at a time for the event loop `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: SimpleQueue[tuple[Callable[[Any], Any], object, asyncio.Future[Outcome]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="longtail-hook", daemon=True)
        self._thread.start()

    def start(self, function: Callable[[Any], Any], argument: object) -> asyncio.Future[Outcome]:
        answer: asyncio.Future[Outcome] = self._loop.create_future()
        self._jobs.put((function, argument, answer))
        return answer

    def stop(self) -> None:
        """End the thread when it is idle, or after its call."""
        self._jobs.put(None)

    def join(self, deadline: float) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, argument, answer = job
            outcome = _called(function, argument)
            try:
                self._loop.call_soon_threadsafe(_deliver, answer, outcome)
            except RuntimeError:  # the runner is closed
                return
            # An idle thread keeps no trajectory alive.
            del job, function, argument, answer, outcome


def _deliver(answer: asyncio.Future[Outcome], outcome: Outcome) -> None:
    if not answer.done():
        answer.set_result(outcome)


# Errors travel as values: a future takes no StopIteration, and SystemExit would end the thread or the loop.


def _called(function: Callable[[Any], Any], argument: object) -> Outcome:
    try:
        return Outcome(function(argument))
    except BaseException as error:
        return Outcome(error=error)


async def _awaited(function: Callable[[Any], Any], argument: object) -> Outcome:
    try:
        return Outcome(await function(argument))
    except BaseException as error:
        return Outcome(error=error)
