"""The driver with an engine that is faked: what it does when callers leave, sinks raise and starts fail."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from longtail.engine.config import EngineConfig
from longtail.engine.driver import EngineDriver
from longtail.engine.errors import EngineDeadError, EngineTimeoutError

TIMEOUT_S = 10.0
CONFIG = EngineConfig(model="none")


class FakeEngine:
    """Stands for `StartedEngine` and the `LLMEngine` in it: requests end when `release` is called."""

    def __init__(self) -> None:
        self.is_shut_down = threading.Event()
        self.link = SimpleNamespace(how_it_ended=lambda: None)
        self.llm_engine = self
        self.waiting: list[str] = []
        self.error: BaseException | None = None
        self._released = threading.Event()

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self.waiting.append(request_id)

    def abort_request(self, request_ids: list[str]) -> None:
        self.waiting = [one for one in self.waiting if one not in request_ids]

    def release(self) -> None:
        self._released.set()

    def step(self) -> list[Any]:
        if self.error is not None:
            raise self.error
        if not self._released.wait(0.01):
            return []
        ended, self.waiting = self.waiting, []
        return [SimpleNamespace(request_id=one, finished=True) for one in ended]

    def shutdown(self) -> None:
        self.is_shut_down.set()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr("longtail.engine.driver.start_engine", lambda config: engine)
    return engine


@pytest.fixture
def driver(fake: FakeEngine) -> Iterator[EngineDriver]:
    made = EngineDriver(CONFIG)
    yield made
    made.close()
    assert fake.is_shut_down.is_set()


def closed(item: Any) -> None:
    """A sink that is an event loop which is gone."""
    raise RuntimeError("Event loop is closed")


def block(driver: EngineDriver) -> Callable[[], None]:
    """Keep the driver busy until the result is called."""
    go_on, entered = threading.Event(), threading.Event()

    def wait(_: Any) -> None:
        entered.set()
        go_on.wait(TIMEOUT_S)

    driver.call_later(wait)
    assert entered.wait(TIMEOUT_S)
    return go_on.set


def test_a_caller_that_leaves_disturbs_nobody(driver: EngineDriver, fake: FakeEngine) -> None:
    got: SimpleQueue[Any] = SimpleQueue()
    driver.submit([("a", [1], None)], got.put)
    unblock = block(driver)
    left = driver.call_later(lambda link: 1)
    assert left.cancel()
    unblock()
    assert driver.wait(driver.call_later(lambda link: 2), "an answer") == 2
    fake.release()
    assert got.get(timeout=TIMEOUT_S).request_id == "a"


def test_a_sink_that_raises_ends_only_its_own_request(driver: EngineDriver, fake: FakeEngine) -> None:
    got: SimpleQueue[Any] = SimpleQueue()
    driver.submit([("lost", [1], None)], closed)
    driver.submit([("kept", [1], None)], got.put)
    fake.release()
    assert got.get(timeout=TIMEOUT_S).request_id == "kept"
    assert driver.num_in_flight == 0
    assert driver.wait(driver.call_later(lambda link: 3), "an answer") == 3


def test_closing_with_a_sink_that_raises_still_stops_the_engine(driver: EngineDriver, fake: FakeEngine) -> None:
    driver.submit([("lost", [1], None)], closed)
    driver.close()
    assert fake.is_shut_down.is_set()


def test_outputs_of_abandoned_requests_do_not_reach_the_next_of_the_same_id(
    driver: EngineDriver, fake: FakeEngine
) -> None:
    old: list[Any] = []
    new: SimpleQueue[Any] = SimpleQueue()
    driver.submit([("a", [1], None), ("b", [1], None)], old.append)
    driver.wait(driver.call_later(lambda link: driver.abandon(["a", "b", "unknown"])), "it")
    assert (driver.num_in_flight, fake.waiting) == (0, [])
    driver.submit([("a", [1], None)], new.put)
    fake.release()
    assert new.get(timeout=TIMEOUT_S).request_id == "a"
    assert old == []


def test_a_bug_in_the_driver_is_an_error_for_everyone_who_waits(driver: EngineDriver, fake: FakeEngine) -> None:
    got: SimpleQueue[Any] = SimpleQueue()
    unblock = block(driver)
    driver.submit([("a", [1], None)], got.put)
    fake.error = SystemExit("not an Exception, so that the driver does not expect it")
    unblock()
    assert isinstance(got.get(timeout=TIMEOUT_S), EngineDeadError)
    assert fake.is_shut_down.wait(TIMEOUT_S)
    with pytest.raises(EngineDeadError):
        driver.call_later(lambda link: 1)


def test_every_posted_command_is_answered_whatever_happens_meanwhile(driver: EngineDriver) -> None:
    futures: list[Future[int]] = []

    def post() -> None:
        try:
            while True:
                futures.append(driver.call_later(lambda link: 1))
        except EngineDeadError:
            pass

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    driver.close()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert futures
    assert all(future.done() for future in futures)


def test_an_engine_that_starts_too_late_is_stopped(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def start(config: EngineConfig) -> FakeEngine:
        go_on.wait(TIMEOUT_S)
        return fake

    monkeypatch.setattr("longtail.engine.driver.start_engine", start)
    with pytest.raises(EngineTimeoutError):
        EngineDriver(dataclasses.replace(CONFIG, start_timeout_s=0.05))
    assert not fake.is_shut_down.is_set()
    go_on.set()
    assert fake.is_shut_down.wait(TIMEOUT_S)


def test_an_engine_whose_start_failed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(config: EngineConfig) -> None:
        raise EngineTimeoutError("something else", 5)

    monkeypatch.setattr("longtail.engine.driver.start_engine", start)
    with pytest.raises(EngineTimeoutError, match="something else"):
        EngineDriver(CONFIG)
