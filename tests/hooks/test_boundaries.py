"""`on_boundary`: what a hook is handed, and what its answers and failures lead to."""

from __future__ import annotations

import time

import msgspec
import pytest

from longtail.engine.hook_points import Refused
from longtail.engine.trajectory import Boundary
from longtail.hooks import Append, Continue, Fork, HookError, Hooks, Stop
from longtail.hooks.errors import InvalidInputError
from longtail.scheduler.boundaries import BOUNDARY_STOP_REASON

BOUNDARY = Boundary(start=0, end=3, made_by="</sql>")


@pytest.fixture
def paused(trajectory):
    return trajectory(finish_reason="abort", stop_reason=BOUNDARY_STOP_REASON, boundaries=[BOUNDARY])


@pytest.mark.parametrize("decision", [Continue(), Stop(), Fork(3), Append([4, 5])], ids=repr)
@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_the_decision_of_a_hook(start, paused, decision, kind) -> None:
    class Plain:
        def on_boundary(self, trajectory, boundary):
            assert (trajectory, boundary) == (paused, BOUNDARY)
            return decision

    class Coroutine:
        async def on_boundary(self, trajectory, boundary):
            return Plain().on_boundary(trajectory, boundary)

    hooks = start(Plain() if kind == "plain" else Coroutine())
    assert hooks.decides_boundaries
    assert hooks.decide(paused).result(10) == decision


def test_the_first_hook_that_does_not_let_it_go_on_decides(start, paused) -> None:
    asked = []

    class Says:
        def __init__(self, decision) -> None:
            self.decision = decision

        def on_boundary(self, trajectory, boundary):
            asked.append(self.decision)
            return self.decision

    hooks = start(Says(Continue()), Says(Append([1])), Says(Stop()))
    assert hooks.decide(paused).result(10) == Append([1])
    assert asked == [Continue(), Append([1])]


def test_without_a_hook_it_goes_on(start, paused) -> None:
    hooks = start()
    assert not hooks.decides_boundaries
    assert hooks.decide(paused).result(10) == Continue()


def fails(trajectory, boundary):
    raise KeyError("no table")


def is_late(trajectory, boundary):
    time.sleep(0.5)
    return Stop()


def answers_none(trajectory, boundary):
    return None


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (fails, "raised KeyError: 'no table'"),
        (is_late, "took longer than 0.05 s"),
        (answers_none, "returned None, expected"),
    ],
)
@pytest.mark.parametrize("on_failure", ["reject", "ignore", "raise"])
def test_every_failure_has_the_outcome_that_the_hook_names(start, paused, answer, what, on_failure) -> None:
    class Bad:
        time_limit_s = 0.05

        def on_boundary(self, trajectory, boundary):
            return answer(trajectory, boundary)

    hook = Bad()
    hook.on_failure = on_failure
    future = start(hook).decide(paused)
    if on_failure == "raise":
        with pytest.raises(HookError, match="at token 3: "):
            future.result(10)
    elif on_failure == "ignore":
        assert future.result(10) == Continue()
    else:
        answered = future.result(10)
        assert isinstance(answered, Refused)
        assert what in answered.reason


def test_a_hook_changes_nothing_in_place(start, paused) -> None:
    class Vandal:
        def on_boundary(self, trajectory, boundary):
            trajectory.output_token_ids.clear()
            return Continue()

    before = msgspec.msgpack.encode(paused)
    start(Vandal()).decide(paused).result(10)
    assert msgspec.msgpack.encode(paused) == before


@pytest.mark.parametrize("wrong", [lambda: Fork(0), lambda: Fork(True), lambda: Append([]), lambda: Append([-1])])
def test_decisions_that_make_no_sense_are_refused_where_they_are_made(wrong) -> None:
    with pytest.raises(InvalidInputError):
        wrong()


def test_closed_hooks_decide_nothing(paused) -> None:
    hooks = Hooks([])
    hooks.close()
    with pytest.raises(HookError):
        hooks.decide(paused).result(10)
