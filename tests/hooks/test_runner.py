"""Hooks run in order for one item, concurrently for different ones, and never hold up the caller."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from concurrent.futures import Future
from typing import Any

import msgspec
import pytest

from longtail.engine.hook_points import HookPoints, Verdict
from longtail.engine.prompts import Prompt
from longtail.hooks import Accept, HookError, Hooks, Reject, StuckHooksError

LIMIT_S = 20.0


def answer(future: Future[Any]) -> Any:
    return future.result(LIMIT_S)


class Recorder:
    """Writes its name into the metadata of whatever passes; `versions` are those that it was told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.versions: list[tuple[str, int]] = []

    def on_prompt(self, prompt):
        return Prompt(**(vars(prompt) | {"metadata": {**prompt.metadata, "by": [*self.seen(prompt), self.name]}}))

    def on_trajectory(self, trajectory):
        metadata = {**trajectory.metadata, "by": [*self.seen(trajectory), self.name]}
        return msgspec.structs.replace(trajectory, metadata=metadata)

    def on_group(self, group):
        return Accept(msgspec.structs.replace(group, metadata={"by": [*self.seen(group), self.name]}))

    def on_weights(self, version):
        self.versions.append((self.name, version))

    @staticmethod
    def seen(item) -> list[str]:
        return item.metadata.get("by", [])


class AsyncRecorder(Recorder):
    async def on_prompt(self, prompt):
        return super().on_prompt(prompt)

    async def on_trajectory(self, trajectory):
        await asyncio.sleep(0)
        return super().on_trajectory(trajectory)

    async def on_group(self, group):
        return super().on_group(group)

    async def on_weights(self, version):
        super().on_weights(version)


def test_hooks_run_in_order_at_every_point_plain_and_coroutine_functions_mixed(start, trajectory, group) -> None:
    recorders = [Recorder("a"), AsyncRecorder("b"), Recorder("c"), AsyncRecorder("d")]
    for recorder in recorders:
        recorder.versions = recorders[0].versions
    hooks = start(*recorders)
    points: HookPoints = hooks
    prompt = Prompt(token_ids=[1], group_id="g")
    assert answer(points.prepare(prompt)) == Prompt(token_ids=[1], group_id="g", metadata={"by": list("abcd")})
    judged = answer(points.finish_trajectory(trajectory()))
    assert judged == trajectory(metadata={"task": "count", "by": list("abcd")})
    assert answer(points.finish_group(group())) == Verdict(group=group(metadata={"by": list("abcd")}))
    assert answer(points.change_weights(3)) is None
    assert recorders[0].versions == [(name, 3) for name in "abcd"]


def test_without_hooks_everything_passes_as_it_is(start, trajectory, group) -> None:
    hooks, prompt = start(), Prompt(text="x")
    assert answer(hooks.prepare(prompt)) is prompt
    assert answer(hooks.finish_trajectory(one := trajectory())) is one
    assert answer(hooks.finish_group(group())) == Verdict(group=group())
    assert answer(hooks.change_weights(1)) is None


def test_a_rejected_group_reaches_no_later_hook_and_says_who_rejected_it(start, group) -> None:
    class Picky:
        def on_group(self, group):
            return Reject("too easy")

    hooks = start(Recorder("first"), Picky(), Recorder("last"))
    assert answer(hooks.finish_group(group())) == Verdict(
        group=group(metadata={"by": ["first"]}), rejected="hooks[1] (Picky): too easy"
    )
    assert [point.calls for point in hooks.stats().points if point.point == "on_group"] == [1, 1, 0]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_slow_judge_delays_neither_the_caller_nor_another_item(start, trajectory, kind) -> None:
    go_on, waiting = threading.Event(), threading.Event()

    class Judge:
        def on_trajectory(self, trajectory):
            if trajectory.index == 0:
                waiting.set()
                assert go_on.wait(LIMIT_S)
            return msgspec.structs.replace(trajectory, reward=1.0)

    class AsyncJudge:
        async def on_trajectory(self, trajectory):
            if trajectory.index == 0:
                waiting.set()
                while not go_on.is_set():
                    await asyncio.sleep(0.001)
            return msgspec.structs.replace(trajectory, reward=1.0)

    hooks = start(Judge() if kind == "plain" else AsyncJudge())
    slow = hooks.finish_trajectory(trajectory(0))
    assert waiting.wait(LIMIT_S)
    assert [answer(hooks.finish_trajectory(trajectory(index))).reward for index in (1, 2)] == [1.0, 1.0]
    assert not slow.done()
    go_on.set()
    assert answer(slow).reward == 1.0


def test_plain_functions_use_all_threads_and_no_more(start, trajectory) -> None:
    lock, together, running, most = threading.Lock(), threading.Barrier(3), 0, 0

    class Meet:
        def on_trajectory(self, trajectory):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            together.wait(LIMIT_S)
            with lock:
                running -= 1
            return trajectory

    hooks = start(Meet(), max_threads=3)
    futures = [hooks.finish_trajectory(trajectory(index)) for index in range(12)]
    assert [answer(future).index for future in futures] == list(range(12))
    assert most == 3


def test_a_thousand_coroutines_run_at_once(start, trajectory) -> None:
    entered = 0

    class Judge:
        async def on_trajectory(self, trajectory):
            nonlocal entered
            entered += 1
            while entered < 1000:
                await asyncio.sleep(0.01)
            return msgspec.structs.replace(trajectory, reward=float(trajectory.index))

    hooks = start(Judge())
    futures = [hooks.finish_trajectory(trajectory(index)) for index in range(1000)]
    assert [answer(future).reward for future in futures] == [float(index) for index in range(1000)]
    assert hooks.stats().points[0].calls == 1000


def test_coroutines_share_one_loop(start, trajectory) -> None:
    loops = set()

    class Judge:
        async def on_trajectory(self, trajectory):
            loops.add(asyncio.get_running_loop())
            return trajectory

        async def on_weights(self, version):
            loops.add(asyncio.get_running_loop())

    hooks = start(Judge(), Judge())
    answer(hooks.finish_trajectory(trajectory()))
    answer(hooks.change_weights(1))
    assert len(loops) == 1


def test_versions_come_one_at_a_time_and_in_order(start) -> None:
    begun, ended, go_on = [], [], threading.Event()

    class Curriculum:
        def on_weights(self, version):
            begun.append(version)
            if version == 1:
                assert go_on.wait(LIMIT_S)
            ended.append(version)

    hooks = start(Curriculum())
    futures = [hooks.change_weights(version) for version in (1, 2, 3)]
    while not begun:
        time.sleep(0.001)
    # Another item of another point passes all the same.
    answer(hooks.prepare(Prompt(text="x")))
    assert begun == [1]
    go_on.set()
    for future in futures:
        answer(future)
    assert begun == ended == [1, 2, 3]


def test_a_callback_may_call_the_hooks(start, trajectory, group) -> None:
    hooks, verdict = start(Recorder("a")), Future[Verdict]()

    def judge(finished: Future[Any]) -> None:
        judged = group(trajectories=[finished.result()])
        hooks.finish_group(judged).add_done_callback(lambda future: verdict.set_result(future.result()))

    hooks.finish_trajectory(trajectory()).add_done_callback(judge)
    assert answer(verdict).group.trajectories[0].metadata["by"] == ["a"]


def test_stats_count_calls_failures_and_timeouts_by_hook_and_point(start, trajectory, group) -> None:
    class Flaky:
        time_limit_s, on_failure = 0.5, "ignore"

        async def on_trajectory(self, trajectory):
            if trajectory.index == 1:
                raise OSError("no judge")
            await asyncio.sleep(LIMIT_S if trajectory.index == 2 else 0.01)
            return trajectory

        def on_group(self, group):
            return Accept()

    hooks = start(Flaky(), Recorder("r"))
    for future in [hooks.finish_trajectory(trajectory(index)) for index in range(4)]:
        answer(future)
    stats = hooks.stats()
    assert [(one.hook, one.point, one.calls, one.failures, one.timeouts) for one in stats.points] == [
        ("hooks[0] (Flaky)", "on_trajectory", 4, 2, 1),
        ("hooks[0] (Flaky)", "on_group", 0, 0, 0),
        ("hooks[1] (r)", "on_prompt", 0, 0, 0),
        ("hooks[1] (r)", "on_trajectory", 4, 0, 0),
        ("hooks[1] (r)", "on_group", 0, 0, 0),
        ("hooks[1] (r)", "on_weights", 0, 0, 0),
    ]
    assert 0.52 <= stats.points[0].seconds < 5
    answer(hooks.finish_group(group()))
    assert stats.points[1].calls == 0
    assert hooks.stats().points[1].calls == 1
    hooks.close()
    assert hooks.stats().points[1].calls == 1


def test_waiting_for_a_thread_counts_neither_as_seconds_nor_towards_the_limit(start, trajectory) -> None:
    class Nap:
        time_limit_s = 1.0

        def on_trajectory(self, trajectory):
            time.sleep(0.3)
            return msgspec.structs.replace(trajectory, reward=1.0)

    hooks = start(Nap(), max_threads=1)
    futures = [hooks.finish_trajectory(trajectory(index)) for index in range(5)]
    assert [answer(future).reward for future in futures] == [1.0] * 5
    (stats,) = hooks.stats().points
    assert (stats.calls, stats.failures) == (5, 0)
    assert 1.5 <= stats.seconds < 3.0


# ---- close -------------------------------------------------------------------------------------------------------


def test_close_answers_what_is_pending_and_cancels_coroutines(trajectory, caplog) -> None:
    go_on, entered, cancelled = threading.Event(), threading.Barrier(3), threading.Event()

    class Plain:
        def on_trajectory(self, trajectory):
            if trajectory.index == 0:
                entered.wait(LIMIT_S)
                go_on.wait(LIMIT_S)
            return trajectory

    class Coroutine:
        async def on_trajectory(self, trajectory):
            entered.wait(LIMIT_S)
            try:
                await asyncio.sleep(LIMIT_S)
            except asyncio.CancelledError:
                cancelled.set()
                raise

    hooks = Hooks([Plain(), Coroutine()], max_threads=1)
    # The second waits in the first hook's queue until a thread is free, or is in the second hook.
    futures = [hooks.finish_trajectory(trajectory(index)) for index in (1, 0, 2)]
    entered.wait(LIMIT_S)
    began = time.monotonic()
    hooks.close(timeout_s=0.2)
    assert time.monotonic() - began < 5
    for future, where in zip(futures, ("hooks[1] (Coroutine)", "hooks[0] (Plain)", "hooks[0] (Plain)"), strict=True):
        with pytest.raises(HookError, match="closed") as caught:
            future.result(0)
        assert (caught.value.hook, caught.value.point) == (where, "on_trajectory")
    assert cancelled.wait(LIMIT_S)
    go_on.set()
    gc.collect()
    assert caplog.records == []


def test_close_waits_for_plain_functions_that_run(trajectory) -> None:
    entered, left = threading.Event(), threading.Event()

    class Slow:
        def on_trajectory(self, trajectory):
            entered.set()
            time.sleep(0.1)
            left.set()
            return trajectory

    with Hooks([Slow()]) as hooks:
        future = hooks.finish_trajectory(trajectory())
        assert entered.wait(LIMIT_S)
    assert left.is_set()
    assert isinstance(future.exception(0), HookError)


def test_after_close_every_call_gives_an_error_and_no_thread_is_left(trajectory, group) -> None:
    before = set(threading.enumerate())
    hooks = Hooks([Recorder("a"), AsyncRecorder("b")])
    answer(hooks.finish_trajectory(trajectory()))
    assert set(threading.enumerate()) > before
    hooks.close()
    hooks.close()
    assert set(threading.enumerate()) <= before
    for future in (
        hooks.prepare(Prompt(text="x")),
        hooks.finish_trajectory(trajectory()),
        hooks.finish_group(group()),
        hooks.change_weights(1),
    ):
        with pytest.raises(HookError, match="closed"):
            future.result(0)


def test_close_from_a_callback_and_from_a_hook_does_not_hang(trajectory) -> None:
    hooks = Hooks([Recorder("a")])
    closed = Future[None]()

    def close(_: Future[Any]) -> None:
        hooks.close()
        closed.set_result(None)

    hooks.finish_trajectory(trajectory()).add_done_callback(close)
    answer(closed)

    returned = threading.Event()

    class Closer:
        def on_trajectory(self, trajectory):
            inner.close()
            returned.set()
            return trajectory

    inner = Hooks([Closer()])
    with pytest.raises(HookError, match="closed"):
        answer(inner.finish_trajectory(trajectory()))
    assert returned.wait(LIMIT_S)


def test_calls_and_close_race_without_a_future_left_behind(trajectory) -> None:
    for _ in range(20):
        hooks, futures = Hooks([AsyncRecorder("a"), Recorder("b")]), []

        def submit(hooks=hooks, futures=futures) -> None:
            futures.extend(hooks.finish_trajectory(trajectory(index)) for index in range(50))

        threads = [threading.Thread(target=submit) for _ in range(2)]
        for thread in threads:
            thread.start()
        hooks.close()
        for thread in threads:
            thread.join()
        assert len(futures) == 100
        assert all(isinstance(future.exception(LIMIT_S), HookError | None) for future in futures)


def test_errors_are_longtails_own() -> None:
    assert issubclass(StuckHooksError, HookError)
    error = HookError("hooks[0] (Judge)", "on_trajectory", "trajectory r/g/0", "took longer than 60 s")
    assert str(error) == "on_trajectory of hooks[0] (Judge) failed for trajectory r/g/0: took longer than 60 s"
