"""Two tasks at one asyncio stream, one that iterates and one that forks: whoever takes an item, both go on."""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from longtail.engine.errors import InvalidInputError
from longtail.engine.round_stream import AsyncGroupStream, AsyncRoundStream

LAST = "the last output"
DRIVER = SimpleNamespace(config=SimpleNamespace(stall_timeout_s=5.0), check_stall=lambda: None)


class Run:
    """A run whose scheduler has stopped the one trajectory: a fork can be taken once the last item was."""

    def __init__(self) -> None:
        self.has_ended = False
        self.is_stopping = True
        self.was_forked = False
        self._is_held = False
        self._has_last = False

    def submit(self, deliver: Any) -> None:
        self.deliver = deliver

    def settle(self) -> bool:
        return self._has_last and not self._is_held

    def take(self, item: Any) -> list[Any]:
        if item == LAST:
            self._has_last = True
            self.is_stopping = False
        return []

    def ask_fork(self, *_: Any) -> Any:
        self._check()
        self._is_held = True
        answer: Future[None] = Future()
        answer.set_result(None)
        return SimpleNamespace(answer=answer)

    def take_fork(self, fork: Any) -> list[str] | None:
        self._check()
        self.was_forked = self._has_last
        return ["branch"] if self._has_last else None

    def end_fork(self, fork: Any) -> None:
        self._is_held = False
        self.deliver(None)

    def _check(self) -> None:
        if self.has_ended:
            raise InvalidInputError("fork", "a round that is not over", "r")

    def ready_groups(self) -> dict[int, Any]:
        return {}

    def finish(self) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(SimpleNamespace(trajectories=[]))
        return future

    def stop(self) -> None:
        pass

    def received(self) -> None:
        pass

    def end(self) -> None:
        self.has_ended = True

    cancel = end


@pytest.mark.parametrize("kind", [AsyncRoundStream, AsyncGroupStream])
def test_both_go_on(kind: Any) -> None:
    async def once(forks_first: bool, waits: tuple[int, int]) -> None:
        run = Run()
        stream = kind(DRIVER, run)

        async def iterate() -> None:
            async for _ in stream:
                pass

        first, second = (stream.fork("t"), iterate()) if forks_first else (iterate(), stream.fork("t"))
        tasks = [asyncio.create_task(first)]
        for _ in range(waits[0]):
            await asyncio.sleep(0)
        tasks.append(asyncio.create_task(second))
        for _ in range(waits[1]):
            await asyncio.sleep(0)
        run.deliver(LAST)
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        # The round may be over before the fork is asked for; it may not hang, or be lost.
        assert run.was_forked or any(isinstance(one, InvalidInputError) for one in results), results

    for forks_first, *waits in itertools.product((False, True), range(5), range(5)):
        asyncio.run(once(forks_first, (waits[0], waits[1])))


@pytest.mark.parametrize("kind", [AsyncRoundStream, AsyncGroupStream])
def test_a_fork_that_waits_ends_with_its_stream(kind: Any) -> None:
    async def once(num_waits: int, iterates: bool) -> None:
        run = Run()
        stream = kind(DRIVER, run)
        tasks = [asyncio.create_task(stream.fork("t"))]
        if iterates:
            tasks.append(asyncio.create_task(anext(stream)))
        for _ in range(num_waits):
            await asyncio.sleep(0)
        if kind is AsyncRoundStream:
            stream.close()
        else:
            closing = asyncio.create_task(stream.aclose())
            await asyncio.sleep(0)
            run.deliver(LAST)
            await asyncio.wait_for(closing, 5)
        for task in tasks[1:]:
            task.cancel()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert run.was_forked or isinstance(results[0], InvalidInputError), results

    for num_waits in range(6):
        for iterates in (False, True):
            asyncio.run(once(num_waits, iterates))
