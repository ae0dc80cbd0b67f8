"""What happens when a hook raises, is late or answers with something else: each has its outcome, none is a reward."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from concurrent.futures import Future
from typing import Any

import msgspec
import pytest

from longtail.engine.hook_points import Verdict
from longtail.engine.prompts import Prompt
from longtail.hooks import Accept, HookError, RewardFunction, RewardSpread, runner

LIMIT_S = 20.0


def answer(future: Future[Any]) -> Any:
    return future.result(LIMIT_S)


class Plain:
    """Fails at every point: `how` is `raises`, `late` or `wrong`."""

    def __init__(self, how: str, on_failure: str | None) -> None:
        self.how, self.time_limit_s, self.go_on = how, 0.05 if how == "late" else LIMIT_S, threading.Event()
        if on_failure is not None:
            self.on_failure = on_failure

    def fail(self, item):
        if self.how == "raises":
            raise ZeroDivisionError("nobody home")
        if self.how == "late":
            self.go_on.wait(LIMIT_S)
            return None
        return "nonsense"

    on_prompt = on_trajectory = on_group = on_weights = fail


class Coroutine(Plain):
    async def fail(self, item):
        if self.how == "late":
            await asyncio.sleep(LIMIT_S)
        return super().fail(item)

    on_prompt = on_trajectory = on_group = on_weights = fail


WHAT = {
    "raises": "raised ZeroDivisionError: nobody home",
    "late": "took longer than 0.05 s",
    "wrong": "returned str 'nonsense', expected",
}
FAILURES = [(kind, how) for kind in (Plain, Coroutine) for how in WHAT]


class Reward:
    """Shows which hooks still run after a failure."""

    def on_trajectory(self, trajectory):
        return msgspec.structs.replace(trajectory, reward=0.5)


@pytest.mark.parametrize(("kind", "how"), FAILURES)
@pytest.mark.parametrize("on_failure", [None, "reject"])
def test_reject_filters_the_group_and_no_later_hook_sees_it(start, trajectory, group, kind, how, on_failure) -> None:
    called = []

    class Filter:
        def on_group(self, group):
            called.append(group)
            return Accept()

    failing = kind(how, on_failure)
    hooks = start(Filter(), failing, Reward())
    assert answer(hooks.finish_trajectory(trajectory(0))) == trajectory(0)
    verdict = answer(hooks.finish_group(group()))
    assert verdict.group == group()
    assert verdict.rejected.startswith(
        f"on_trajectory of hooks[1] ({kind.__name__}) failed for trajectory r/g/0: {WHAT[how]}"
    )
    assert called == []
    # Judged once: the same ids may come again, and now it is on_group that fails.
    verdict = answer(hooks.finish_group(group()))
    assert called == [group()]
    assert verdict.rejected.startswith(f"on_group of hooks[1] ({kind.__name__}) failed for group g: {WHAT[how]}")
    failing.go_on.set()


@pytest.mark.parametrize(("kind", "how"), FAILURES)
def test_ignore_uses_the_value_from_before(start, trajectory, group, kind, how) -> None:
    failing = kind(how, "ignore")
    hooks = start(failing, Reward())
    prompt = Prompt(token_ids=[1, 2])
    assert answer(hooks.prepare(prompt)) == prompt
    assert answer(hooks.finish_trajectory(trajectory())) == trajectory(reward=0.5)
    assert answer(hooks.finish_group(group())) == Verdict(group=group())
    assert answer(hooks.change_weights(1)) is None
    failing.go_on.set()
    assert [one.failures for one in hooks.stats().points[:4]] == [1, 1, 1, 1]


@pytest.mark.parametrize(("kind", "how"), FAILURES)
@pytest.mark.parametrize("on_failure", ["reject", "raise"])
def test_raise_ends_the_round_and_so_does_reject_where_there_is_no_group(
    start, trajectory, group, kind, how, on_failure
) -> None:
    failing = kind(how, on_failure)
    hooks = start(failing, Reward())
    futures = {"on_prompt": hooks.prepare(Prompt(token_ids=[1])), "on_weights": hooks.change_weights(1)}
    if on_failure == "raise":
        futures |= {"on_trajectory": hooks.finish_trajectory(trajectory()), "on_group": hooks.finish_group(group())}
    for point, future in futures.items():
        with pytest.raises(HookError) as caught:
            answer(future)
        assert (caught.value.hook, caught.value.point) == (f"hooks[0] ({kind.__name__})", point)
        assert caught.value.what.startswith(WHAT[how])
        assert isinstance(caught.value.__cause__, ZeroDivisionError) == (how == "raises")
    failing.go_on.set()


def test_a_failed_reward_never_becomes_a_number(start, trajectory, group) -> None:
    def judge(trajectory):
        if trajectory.index == 1:
            raise ConnectionError("judge is down")
        return 1.0

    for on_failure, reason in (("reject", "judge is down"), ("ignore", "r/g/1.reward")):
        hooks = start(RewardFunction(judge, on_failure=on_failure), RewardSpread())
        members = [answer(hooks.finish_trajectory(trajectory(index))) for index in range(3)]
        assert [one.reward for one in members] == [1.0, None, 1.0]
        assert reason in answer(hooks.finish_group(group(trajectories=members))).rejected


def test_the_reason_counts_the_trajectories_that_failed(start, trajectory, group) -> None:
    hooks = start(Plain("raises", "reject"))
    members = [answer(hooks.finish_trajectory(trajectory(index))) for index in range(3)]
    reason = answer(hooks.finish_group(group(trajectories=members))).rejected
    assert "r/g/0" in reason
    assert reason.endswith("(and 2 more of its trajectories)")


def test_a_trajectory_that_comes_again_and_passes_is_not_held_against_its_group(start, trajectory, group) -> None:
    failing = Plain("raises", "reject")
    hooks = start(
        type("Once", (), {"on_trajectory": lambda _, one: one if failing.go_on.is_set() else failing.fail(one)})()
    )
    answer(hooks.finish_trajectory(trajectory()))
    failing.go_on.set()
    answer(hooks.finish_trajectory(trajectory()))
    assert answer(hooks.finish_group(group())) == Verdict(group=group())


def test_records_of_groups_that_are_never_judged_are_bounded_and_none_is_forgotten(
    start, trajectory, group, monkeypatch
) -> None:
    monkeypatch.setattr(runner, "MAX_FAILED_TRAJECTORIES", 3)
    hooks = start(Plain("raises", "reject"))
    for index in range(3):
        answer(hooks.finish_trajectory(trajectory(index)))
    with pytest.raises(HookError, match="3 such trajectories wait"):
        answer(hooks.finish_trajectory(trajectory(3)))
    assert answer(hooks.finish_group(group(trajectories=[trajectory(0)]))).rejected is not None
    answer(hooks.finish_trajectory(trajectory(3)))


class Evil(Exception):
    def __str__(self) -> str:
        raise RuntimeError("even this")


@pytest.mark.parametrize(
    "error", [StopIteration(), SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError(), MemoryError(), Evil()]
)
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_whatever_a_hook_raises_is_a_failure_and_the_next_call_works(start, trajectory, error, kind) -> None:
    class Hook:
        on_failure = "raise"

        def on_trajectory(self, trajectory):
            if trajectory.index == 0:
                raise error
            return trajectory

    class AsyncHook(Hook):
        async def on_trajectory(self, trajectory):
            return super().on_trajectory(trajectory)

    hooks = start(Hook() if kind == "plain" else AsyncHook(), max_threads=1)
    with pytest.raises(HookError, match="raised"):
        answer(hooks.finish_trajectory(trajectory(0)))
    assert answer(hooks.finish_trajectory(trajectory(1))) == trajectory(1)


def test_a_hook_that_cancels_every_task_of_the_loop_fails_and_nothing_hangs(start, trajectory) -> None:
    class Wild:
        on_failure = "raise"

        async def on_trajectory(self, trajectory):
            for task in asyncio.all_tasks():
                task.cancel()
            await asyncio.sleep(0)
            return trajectory

    hooks = start(Wild())
    for future in [hooks.finish_trajectory(trajectory(index)) for index in range(20)]:
        with pytest.raises(HookError, match="CancelledError"):
            answer(future)


def test_a_plain_function_that_returns_a_coroutine_is_told_what_to_do(start, trajectory) -> None:
    unused = asyncio.sleep(0)

    class Judge:
        on_failure = "raise"

        def on_trajectory(self, trajectory):
            return unused

    with pytest.raises(HookError, match="async def"):
        answer(start(Judge()).finish_trajectory(trajectory()))
    # Closed, so that Python does not warn of it.
    assert inspect.getcoroutinestate(unused) == inspect.CORO_CLOSED


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_what_a_hook_does_after_its_limit_changes_nothing(start, trajectory, group, kind) -> None:
    go_on, ended = threading.Event(), threading.Event()

    class Late:
        time_limit_s, on_failure = 0.05, "ignore"

        def on_trajectory(self, trajectory):
            go_on.wait(LIMIT_S)
            trajectory.output_token_ids.clear()
            trajectory.loss_mask[:] = [0, 0, 0]
            ended.set()
            return msgspec.structs.replace(trajectory, reward=9.0)

    class Stubborn(Late):
        async def on_trajectory(self, trajectory):
            while not go_on.is_set():
                try:
                    await asyncio.sleep(0.005)
                except asyncio.CancelledError:
                    continue
            return super().on_trajectory(trajectory)

    hooks = start(Late() if kind == "plain" else Stubborn())
    future = hooks.finish_trajectory(trajectory())
    left = answer(future)
    go_on.set()
    assert ended.wait(LIMIT_S)
    assert left == future.result() == trajectory()
    assert answer(hooks.finish_group(group(trajectories=[left]))).rejected is None


def test_failures_are_logged_with_one_traceback_a_method(start, trajectory, caplog) -> None:
    caplog.set_level(logging.WARNING, "longtail.hooks")
    hooks = start(Plain("raises", "ignore"))
    for index in range(3):
        answer(hooks.finish_trajectory(trajectory(index)))
    assert [("r/g/" in one.getMessage(), one.exc_info is not None) for one in caplog.records] == [
        (True, True), (True, False), (True, False),
    ]  # fmt: skip
    assert "nobody home" in caplog.text
    assert "Traceback" in caplog.text
