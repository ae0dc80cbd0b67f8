"""Runs a recipe's hooks behind the engine's hook points.

Every call returns a future at once. One item (a prompt, a trajectory, a group) goes through the hooks in their order;
different items run concurrently. What is decided about an item is decided in one event loop, the runner's, which runs
no code of a hook, so that no hook can hold up another. Where hooks run is `longtail.hooks.threads`' affair, and what
they may answer that of `longtail.hooks.checks`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from longtail.engine.hook_points import Continue, Decision, Refused, Verdict
from longtail.engine.prompts import Prompt
from longtail.engine.trajectory import Group, Trajectory
from longtail.hooks import checks
from longtail.hooks.binding import HookCall, bind_hooks
from longtail.hooks.errors import HookError, InvalidInputError, StuckHooksError
from longtail.hooks.loop_thread import LoopThread
from longtail.hooks.protocol import POINTS, Point
from longtail.hooks.stats import HookStats, Tally
from longtail.hooks.threads import HookThreads, NoThreadLeft, Outcome

T = TypeVar("T")

#: Trajectories of groups that were not judged yet, with a hook that failed. A record that went missing would let its
#: group pass, so more of them end the round.
MAX_FAILED_TRAJECTORIES = 100_000

_MAX_ERROR_CHARS = 400

_logger = logging.getLogger("longtail.hooks")


@dataclass(eq=False, slots=True)
class _Item(Generic[T]):
    """One thing on its way through the hooks of a point; `hook` is the one that it is at."""

    point: Point
    subject: str
    future: Future[T] = field(default_factory=Future)
    hook: str = "all hooks"
    task: asyncio.Task[None] | None = None

    def error(self, what: str) -> HookError:
        return HookError(self.hook, self.point, self.subject, what)


class Hooks:
    """The hooks of one engine (`longtail.engine.hook_points.HookPoints`). Close it, or use it in a `with` statement.

    Methods may be called from any thread. Their futures cannot be cancelled; callbacks of the futures run in the
    runner's thread and must not block. What hooks are and how they fail is in `longtail.hooks.protocol`.

    Args:
        hooks: called in this order.
        max_threads: threads for plain functions, 1 to 1024; an item that finds none free waits, without limit, but
            every call before it has its own.
        max_stuck_threads: threads that plain functions may hold past their limit, 1 to 1024. When so many do, the next
            plain function is not called and the future raises `StuckHooksError`, whatever `on_failure` says. Event
            loops that coroutine functions block have a bound of their own, the same number.

    Raises:
        InvalidInputError: names the argument, e.g. `hooks[2].on_trajectry`.

    """

    def __init__(self, hooks: Sequence[object], *, max_threads: int = 8, max_stuck_threads: int = 32) -> None:
        for name, value in (("max_threads", max_threads), ("max_stuck_threads", max_stuck_threads)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
                raise InvalidInputError(name, "an integer in [1, 1024]", value)
        calls = bind_hooks(hooks)
        self._calls = {point: [call for call in calls if call.point == point] for point in POINTS}
        self._tally = Tally(calls)
        self._threads = HookThreads(max_threads, max_stuck_threads)
        self._lock = threading.Lock()
        self._closed = False
        self._pending: set[_Item[Any]] = set()
        # In the runner's loop only.
        self._failed: dict[str, str] = {}
        self._weights_turn = asyncio.Lock()
        self._runner = LoopThread("longtail-hooks")

    def prepare(self, prompt: Prompt) -> Future[Prompt]:
        """The prompt as the `on_prompt` hooks leave it. The future raises `HookError`."""
        subject = "a prompt" if prompt.group_id is None else f"prompt {prompt.group_id}"
        return self._start("on_prompt", subject, partial(self._prepare, prompt))

    @property
    def decides_boundaries(self) -> bool:
        """Whether a hook has `on_boundary`."""
        return bool(self._calls["on_boundary"])

    def decide(self, trajectory: Trajectory) -> Future[Decision | Refused]:
        """What the first `on_boundary` hook says that does not let it go on. The future raises `HookError`."""
        subject = f"trajectory {trajectory.trajectory_id} at token {len(trajectory.output_token_ids)}"
        return self._start("on_boundary", subject, partial(self._decide, trajectory))

    def finish_trajectory(self, trajectory: Trajectory) -> Future[Trajectory]:
        """The trajectory as the `on_trajectory` hooks leave it. The future raises `HookError`.

        A trajectory whose hook failed, where that rejects the group, is as it was before that hook; `finish_group`
        rejects the group that it is in.
        """
        subject = f"trajectory {trajectory.trajectory_id}"
        return self._start("on_trajectory", subject, partial(self._finish_trajectory, trajectory))

    def finish_group(self, group: Group) -> Future[Verdict]:
        """What the `on_group` hooks say, up to the first that rejects the group. The future raises `HookError`."""
        return self._start("on_group", f"group {group.group_id}", partial(self._finish_group, group))

    def change_weights(self, version: int) -> Future[None]:
        """Tell the `on_weights` hooks, one version after the other. The future raises `HookError`."""
        return self._start("on_weights", f"version {version}", partial(self._change_weights, version))

    def stats(self) -> HookStats:
        """Calls, failures and seconds so far, by hook and method. Also after `close()`."""
        return self._tally.snapshot(self._threads.num_stuck)

    def close(self, timeout_s: float = 5.0) -> None:
        """End it: futures without an answer get a `HookError` now, and so does whoever calls later.

        Coroutine functions are cancelled; plain functions that run, and are not late yet, are waited for, all in all
        for `timeout_s` at most. Safe to call twice, and from a callback of a future.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._closed = True
            pending, self._pending = self._pending, set()
        for item in pending:
            item.future.set_exception(item.error("there was no answer yet when the hooks were closed"))
        self._runner.stop(deadline)
        self._threads.stop(deadline)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # ---- items, and who gives their answer -----------------------------------------------------------------------

    def _start(self, point: Point, subject: str, work: Callable[[_Item[T]], Coroutine[Any, Any, T]]) -> Future[T]:
        item: _Item[T] = _Item(point, subject)
        item.future.set_running_or_notify_cancel()
        with self._lock:
            if not self._closed:
                self._pending.add(item)
                self._runner.loop.call_soon_threadsafe(self._begin, item, work)
                return item.future
        item.future.set_exception(item.error("the hooks are closed"))
        return item.future

    def _begin(self, item: _Item[T], work: Callable[[_Item[T]], Coroutine[Any, Any, T]]) -> None:
        item.task = self._runner.loop.create_task(self._carry(item, work))

    async def _carry(self, item: _Item[T], work: Callable[[_Item[T]], Coroutine[Any, Any, T]]) -> None:
        try:
            answer = await work(item)
        except BaseException as error:
            if self._take(item):
                item.future.set_exception(error)
        else:
            if self._take(item):
                item.future.set_result(answer)

    def _take(self, item: _Item[Any]) -> bool:
        """Whether it is still to be answered, by whoever asks first: its own task or `close()`."""
        with self._lock:
            if item in self._pending:
                self._pending.remove(item)
                return True
        return False

    # ---- in the runner's loop ------------------------------------------------------------------------------------

    async def _prepare(self, prompt: Prompt, item: _Item[Prompt]) -> Prompt:
        for call in self._calls["on_prompt"]:
            argument, check = checks.copied_prompt(prompt), partial(checks.checked_prompt, prompt)
            answer = await self._call(item, call, argument, check)
            if not isinstance(answer, HookError):
                prompt = answer
        return prompt

    async def _decide(self, trajectory: Trajectory, item: _Item[Decision | Refused]) -> Decision | Refused:
        for call in self._calls["on_boundary"]:
            answer = await self._call(item, call, checks.copied_trajectory(trajectory), checks.checked_decision)
            if isinstance(answer, HookError):
                if call.on_failure == "reject":
                    return Refused(str(answer))
            elif not isinstance(answer, Continue):
                return answer
        return Continue()

    async def _finish_trajectory(self, trajectory: Trajectory, item: _Item[Trajectory]) -> Trajectory:
        self._failed.pop(trajectory.trajectory_id, None)
        for call in self._calls["on_trajectory"]:
            argument, check = checks.copied_trajectory(trajectory), partial(checks.checked_trajectory, trajectory)
            answer = await self._call(item, call, argument, check)
            if not isinstance(answer, HookError):
                trajectory = answer
            elif call.on_failure == "reject":
                if len(self._failed) >= MAX_FAILED_TRAJECTORIES:
                    raise item.error(
                        f"{answer.what}; {len(self._failed)} such trajectories wait for their groups to be judged, "
                        "which is the bound"
                    ) from answer
                self._failed[trajectory.trajectory_id] = str(answer)
                break
        return trajectory

    async def _finish_group(self, group: Group, item: _Item[Verdict]) -> Verdict:
        failed = [self._failed.pop(one.trajectory_id, None) for one in group.trajectories]
        if reasons := [reason for reason in failed if reason is not None]:
            others = f" (and {len(reasons) - 1} more of its trajectories)" if len(reasons) > 1 else ""
            return Verdict(group=group, rejected=reasons[0] + others)
        for call in self._calls["on_group"]:
            argument, check = checks.copied_group(group), partial(checks.checked_verdict, group)
            answer = await self._call(item, call, argument, check)
            if isinstance(answer, HookError):
                if call.on_failure == "reject":
                    return Verdict(group=group, rejected=str(answer))
            elif answer.rejected is not None:
                return Verdict(group=group, rejected=f"{call.hook}: {answer.rejected}")
            else:
                group = answer.group
        return Verdict(group=group)

    async def _change_weights(self, version: int, item: _Item[None]) -> None:
        async with self._weights_turn:
            for call in self._calls["on_weights"]:
                await self._call(item, call, version, checks.checked_nothing)

    async def _call(
        self, item: _Item[Any], call: HookCall, argument: object, check: Callable[[object], T]
    ) -> T | HookError:
        """The checked answer of one hook, or the failure; one that ends the round is raised."""
        item.hook = call.hook
        try:
            outcome = await self._threads.run(call, argument)
        except NoThreadLeft as reason:
            self._tally.count(call, seconds=0.0, failed=True, late=False)
            raise StuckHooksError(call.hook, call.point, item.subject, str(reason)) from None
        try:
            answer = _checked(call, outcome, check)
        except checks.WrongAnswer as wrong:
            first = self._tally.count(call, seconds=outcome.seconds, failed=True, late=outcome.late)
            failure = item.error(str(wrong))
            failure.__cause__ = wrong.__cause__
        else:
            self._tally.count(call, seconds=outcome.seconds, failed=False, late=False)
            return answer
        if call.on_failure == "raise":
            raise failure
        # The traceback once a method: a judge that is down fails for every trajectory.
        _logger.warning("%s (on_failure=%s)", failure, call.on_failure, exc_info=failure.__cause__ if first else None)
        return failure


def _checked(call: HookCall, outcome: Outcome, check: Callable[[object], T]) -> T:
    if outcome.late:
        raise checks.WrongAnswer(f"took longer than {call.time_limit_s:g} s")
    if outcome.error is not None:
        raise checks.WrongAnswer(_in_words(outcome.error)) from outcome.error
    if inspect.iscoroutine(outcome.value):
        outcome.value.close()
        raise checks.WrongAnswer("returned a coroutine, but is no coroutine function: declare it with `async def`")
    try:
        return check(outcome.value)
    except checks.WrongAnswer:
        raise
    except Exception as error:
        raise checks.WrongAnswer(_in_words(error)) from error


def _in_words(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # an exception's own __str__ may be wrong as well
        text = "(no text)"
    if len(text) > _MAX_ERROR_CHARS:
        text = text[: _MAX_ERROR_CHARS - 3] + "..."
    return text if isinstance(error, checks.WrongAnswer) else f"raised {type(error).__name__}: {text}"
