"""Calls past their limit: threads are replaced, counted and bounded, and none keeps the process alive."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from longtail.hooks import HookError, StuckHooksError, threads

LIMIT_S = 20.0


def answer(future: Future[Any]) -> Any:
    return future.result(LIMIT_S)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Stuck:
    """Hangs until `go_on` for trajectories with an index below `num_stuck`."""

    time_limit_s, on_failure = 0.05, "ignore"

    def __init__(self, num_stuck: int) -> None:
        self.num_stuck, self.go_on, self.threads = num_stuck, threading.Event(), set()

    def on_trajectory(self, trajectory):
        self.threads.add(threading.current_thread())
        if trajectory.index < self.num_stuck:
            self.go_on.wait(LIMIT_S)
        return trajectory


@pytest.fixture
def stuck() -> Iterator[Callable[[int], Stuck]]:
    made: list[Stuck] = []

    def make(num_stuck: int) -> Stuck:
        made.append(Stuck(num_stuck))
        return made[-1]

    yield make
    for hook in made:
        hook.go_on.set()


def test_stuck_threads_are_replaced_and_come_back(start, trajectory, stuck) -> None:
    hook = stuck(5)
    hooks = start(hook, max_threads=2)
    futures = [hooks.finish_trajectory(trajectory(index)) for index in range(9)]
    for future in futures:
        answer(future)
    assert hooks.stats().points[0].timeouts == 5
    assert hooks.stats().stuck_threads == 5
    assert all(thread.daemon for thread in hook.threads)
    hook.go_on.set()
    wait_until(lambda: hooks.stats().stuck_threads == 0)
    # Those that came back are not needed any more: the two that took their place are.
    wait_until(lambda: sum(thread.is_alive() for thread in hook.threads) <= 2)
    assert answer(hooks.finish_trajectory(trajectory(0))) == trajectory(0)


@pytest.mark.parametrize("on_failure", ["reject", "ignore", "raise"])
def test_too_many_stuck_threads_end_the_round_and_name_who_holds_them(start, trajectory, stuck, on_failure) -> None:
    hook = stuck(3)
    hook.on_failure = on_failure
    hooks = start(hook, max_threads=2, max_stuck_threads=3)
    for index in range(3):
        future = hooks.finish_trajectory(trajectory(index))
        assert isinstance(future.exception(LIMIT_S), HookError) == (on_failure == "raise")
    with pytest.raises(StuckHooksError, match=r"3 threads \(the bound\) are stuck in on_trajectory of hooks\[0\]"):
        answer(hooks.finish_trajectory(trajectory(3)))
    assert hooks.stats().stuck_threads == 3
    assert (hooks.stats().points[0].calls, hooks.stats().points[0].failures) == (4, 4)
    hook.go_on.set()
    wait_until(lambda: hooks.stats().stuck_threads == 0)
    assert answer(hooks.finish_trajectory(trajectory(4))) == trajectory(4)


def test_calls_that_waited_while_the_bound_was_reached_are_refused_too(start, trajectory, stuck) -> None:
    hooks = start(stuck(1), max_threads=1, max_stuck_threads=1)
    futures = [hooks.finish_trajectory(trajectory(index)) for index in range(10)]
    errors = [future.exception(LIMIT_S) for future in futures]
    assert [type(error) for error in errors] == [type(None)] + [StuckHooksError] * 9


def test_coroutine_functions_run_while_every_thread_is_stuck(start, trajectory, stuck) -> None:
    class Quick:
        async def on_weights(self, version):
            await asyncio.sleep(0)

    hooks = start(stuck(1), Quick(), max_threads=1, max_stuck_threads=1)
    answer(hooks.finish_trajectory(trajectory(0)))
    assert answer(hooks.change_weights(1)) is None
    with pytest.raises(StuckHooksError):
        answer(hooks.finish_trajectory(trajectory(1)))


def test_a_late_coroutine_is_cancelled(start, trajectory) -> None:
    cancelled = threading.Event()

    class Late:
        time_limit_s, on_failure = 0.05, "ignore"

        async def on_trajectory(self, trajectory):
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.set()

    hooks = start(Late())
    answer(hooks.finish_trajectory(trajectory()))
    assert cancelled.wait(LIMIT_S)
    assert hooks.stats().stuck_threads == 0


def test_close_does_not_wait_for_stuck_threads_and_they_end_in_silence(start, trajectory, stuck, monkeypatch) -> None:
    complaints = []
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    hook = stuck(1)
    hooks = start(hook)
    answer(hooks.finish_trajectory(trajectory(0)))
    began = time.monotonic()
    hooks.close(timeout_s=LIMIT_S)
    assert time.monotonic() - began < LIMIT_S / 2
    hook.go_on.set()
    wait_until(lambda: not any(thread.is_alive() for thread in hook.threads))
    assert complaints == []


class Blocking:
    """A coroutine function that blocks its event loop for trajectory 0."""

    time_limit_s, on_failure = 0.1, "raise"

    def __init__(self) -> None:
        self.go_on, self.loops = threading.Event(), []

    async def on_trajectory(self, trajectory):
        self.loops.append(asyncio.get_running_loop())
        if trajectory.index == 0:
            self.go_on.wait(LIMIT_S)
        elif trajectory.index == 1:
            await asyncio.sleep(0.15)
        return trajectory


def test_a_blocked_event_loop_is_replaced_and_ends_when_it_comes_back(start, trajectory, monkeypatch) -> None:
    monkeypatch.setattr(threads, "BLOCKED_AFTER_S", 0.1)
    hook = Blocking()
    hooks = start(hook)
    with pytest.raises(HookError, match="longer than"):
        answer(hooks.finish_trajectory(trajectory(0)))
    wait_until(lambda: hooks.stats().stuck_threads == 1)
    assert answer(hooks.finish_trajectory(trajectory(2))) == trajectory(2)
    assert hook.loops[0] is not hook.loops[1]
    hook.go_on.set()
    wait_until(lambda: hooks.stats().stuck_threads == 0)
    wait_until(hook.loops[0].is_closed)
    assert answer(hooks.finish_trajectory(trajectory(3))) == trajectory(3)
    assert hook.loops[2] is hook.loops[1]


def test_a_loop_that_only_has_a_late_coroutine_is_not_replaced(start, trajectory, monkeypatch) -> None:
    monkeypatch.setattr(threads, "BLOCKED_AFTER_S", 0.1)
    hook = Blocking()
    hooks = start(hook)
    with pytest.raises(HookError, match="longer than"):
        answer(hooks.finish_trajectory(trajectory(1)))
    time.sleep(0.2)
    assert answer(hooks.finish_trajectory(trajectory(2))) == trajectory(2)
    assert hook.loops[0] is hook.loops[1]
    assert hooks.stats().stuck_threads == 0


def test_blocked_event_loops_are_bounded_too_and_close_does_not_wait_for_them(
    start, trajectory, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(threads, "BLOCKED_AFTER_S", 0.05)
    hook = Blocking()
    hooks = start(hook, max_stuck_threads=1)
    with pytest.raises(HookError, match="longer than"):
        answer(hooks.finish_trajectory(trajectory(0)))
    wait_until(lambda: hooks.stats().stuck_threads == 1)
    with pytest.raises(StuckHooksError, match="blocks the event loop"):
        answer(hooks.finish_trajectory(trajectory(1)))
    began = time.monotonic()
    hooks.close()
    assert time.monotonic() - began < 4
    hook.go_on.set()
    wait_until(hook.loops[0].is_closed)
    assert caplog.records == []


PROCESS = """
import sys, threading, time
from longtail.engine.prompts import Prompt
from longtail.hooks import Hooks

class Stuck:
    time_limit_s, on_failure = 0.05, "ignore"

    def on_prompt(self, prompt):
        time.sleep(3600)

class Blocking(Stuck):
    async def on_prompt(self, prompt):
        time.sleep(3600)

hooks = Hooks([Stuck(), Blocking()])
prompt = Prompt(text="x")
print(hooks.prepare(prompt).result(30) == prompt, hooks.stats().stuck_threads, flush=True)
if sys.argv[1] == "close":
    hooks.close(0.1)
"""


@pytest.mark.parametrize("ending", ["close", "exit"])
def test_stuck_hooks_do_not_keep_the_process_alive(ending: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, ending], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "True 1\n"), done.stderr
    # The two failures are logged, and nothing else.
    assert [line.split(" failed")[0] for line in done.stderr.splitlines()] == [
        "on_prompt of hooks[0] (Stuck)",
        "on_prompt of hooks[1] (Blocking)",
    ]


def test_importing_and_running_hooks_needs_no_vllm_torch_or_reasoning_gym() -> None:
    body = (
        "import sys, longtail.hooks as h; h.Hooks([h.RewardSpread()]).close();"
        "print([name for name in ('vllm', 'torch', 'reasoning_gym', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
