"""Connects one round that carries over, or one stream without rounds, to an engine, to hooks and to its caller.

A run lives in the thread of its caller: what the engine and the hooks have to say comes as items of one queue, taken
one by one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from threading import RLock
from typing import TYPE_CHECKING, Any

from longtail.engine.carry_book import CarryBook, VersionChanged
from longtail.engine.carry_boundaries import CarryBoundaries
from longtail.engine.carry_forks import CarryForks
from longtail.engine.carry_round import CarryRound
from longtail.engine.carry_stats import masked, masked_round, round_stats
from longtail.engine.config import MAX_SEED, SamplingConfig
from longtail.engine.driver import EngineDriver
from longtail.engine.errors import EngineDeadError, InvalidInputError
from longtail.engine.forks import Fork
from longtail.engine.fresh_prompts import FreshPrompts, Prepared
from longtail.engine.group_state import GroupState
from longtail.engine.judging import HookAnswer
from longtail.engine.prompt_source import PromptSource
from longtail.engine.prompts import tokenize_prompts
from longtail.engine.resumed_text import with_whole_text
from longtail.engine.rounds import MemberPlan, check_arguments, check_count
from longtail.engine.segments import segment_of
from longtail.engine.trajectory import Group, Round, Trajectory
from longtail.engine.tree_members import Orphans, check_budgets, checked_width
from longtail.engine.vllm_args import sampling_params
from longtail.engine.waves import Waves
from longtail.scheduler.admission import FixedOverProvision, OverProvision, RoundOutcome
from longtail.scheduler.boundaries import BOUNDARY_STOP_REASON
from longtail.scheduler.limits import MAX_TARGET_GROUPS
from longtail.scheduler.metadata import CUT_STOP_REASON, report_of
from longtail.scheduler.tree_place import DISMISSED_STOP_REASON

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

    from longtail.engine.core_link import CoreLink

_MAX_ID_CHARS = 160
_OUR_STOP_REASONS = frozenset({CUT_STOP_REASON, BOUNDARY_STOP_REASON, DISMISSED_STOP_REASON})


class CarryRun:
    """One round over a book, or (`target_groups=None`) a stream of groups with `num_groups` in flight.

    Raises:
        InvalidInputError: an argument is wrong, or another round of the book runs; nothing was submitted.

    """

    def __init__(
        self,
        driver: EngineDriver,
        book: CarryBook,
        prompts: Any,
        *,
        group_size: int,
        target_groups: int | None,
        over_provision: float | None,
        sampling: SamplingConfig,
        round_id: str | None,
        num_groups: int = 0,
        can_fork: bool = False,
    ) -> None:
        engine = driver.engine
        group_size = checked_width(group_size, sampling, can_fork=can_fork)
        self._has_boundary_hook = book.hooks is not None and book.hooks.decides_boundaries
        self.round_id = check_arguments(
            group_size, target_groups, over_provision, sampling, round_id, engine.tokenizer,
            has_boundary_hook=self._has_boundary_hook,
        )  # fmt: skip
        if target_groups is None:
            check_count("num_groups", num_groups, MAX_TARGET_GROUPS)
        if len(self.round_id) > _MAX_ID_CHARS:
            raise InvalidInputError("round_id", f"at most {_MAX_ID_CHARS} characters", round_id)
        if over_provision is not None and book.adaptive is not None:
            raise InvalidInputError("over_provision", "nothing, because carry.target_carried decides", over_provision)
        if target_groups is None and book.store.recovered is not None:
            what = "rollout() first, which returns the round that was complete when the last process died"
            raise InvalidInputError("stream", what, book.store.recovered.round_id)
        if book.is_busy:
            raise InvalidInputError("rollout", "one carrying round at a time", "a second")
        for name, asked in (("can_fork", can_fork), ("sampling.tree", sampling.tree)):
            if asked and not book.config.park:
                raise InvalidInputError(name, "CarryConfig.park with it, because branches share parked KV", asked)
        self._driver = driver
        self._book = book
        self._can_fork = can_fork
        self._group_size = group_size
        self._sampling = sampling
        self._target_groups = target_groups
        policy: OverProvision = book.adaptive or FixedOverProvision(over_provision or 1.0)
        self._policy = policy
        self._num_groups = num_groups if target_groups is None else policy.num_groups(target_groups)
        source = PromptSource(
            prompts, book.store.totals.cursor, book.leftover, is_durable=book.config.journal is not None
        )
        self._fresh = FreshPrompts(source, book.hooks, book.inbox)
        self._recovered = book.store.recovered
        self._started = time.monotonic()
        self._waves = Waves()
        #: Outputs of branches whose parents run.
        self._orphans: Orphans[RequestOutput] = Orphans()
        self._boundaries: CarryBoundaries | None = None
        self._has_ended = False
        self._is_finishing = False
        #: A group does not wait for a fork any more, and the item that lets it go on is on its way.
        self._is_released = False
        self._ending = RLock()
        driver.claim_round(self.round_id)
        book.is_busy = True

    # ---- run ---------------------------------------------------------------------------------------------------

    def submit(self, deliver: Callable[[Any], object]) -> None:
        """Begin: judge what is old, take what is banked, let groups run. Items go to `deliver` from now on."""
        try:
            self._begin(deliver)
        except BaseException:
            self.cancel()
            raise

    def _begin(self, deliver: Callable[[Any], object]) -> None:
        self._deliver = deliver
        if self._recovered is not None:
            return
        self._round = CarryRound(
            self._book.store,
            round_id=self.round_id,
            target_groups=self._target_groups,
            config=self._book.config,
            version=self._driver.weight_version,
            is_judged=self._book.hooks is not None,
            max_model_len=self._driver.engine.limits.max_model_len,
            can_fork=self._can_fork,
            has_boundaries=self._has_boundary_hook,
        )
        self._forks = CarryForks(self._driver, self._round, self._waves)
        if self._has_boundary_hook:
            self._boundaries = CarryBoundaries(self._driver, self._round, self._forks, self._book, self._waves)
        if self._book.judging is not None:
            self._book.judging.keep_only(self._book.store.carried.values())
        self._judge(self._round.complete())
        self._book.inbox.attach(deliver)
        self._advance()
        if self._target_groups is not None and not self._round.num_in_play and not self._fresh.num_preparing:
            raise InvalidInputError("prompts", f"a prompt at position {self._fresh.source.cursor}", "no more prompts")

    def settle(self) -> bool:
        """Take note of the weights' version; whether nothing is to be waited for.

        The round has its target then, or nothing more can come.
        """
        if self._recovered is not None:
            return True
        self._note_version()
        if self._round.num_running or self._round.is_forking() or self._is_released:
            return False
        if self._round.is_full:
            return True
        return not (self._round.num_judging or self._fresh.num_preparing or self._round.paused)

    def take(self, item: Any) -> list[Trajectory]:
        """Take one item; returns trajectories that have just ended by themselves.

        Raises:
            Exception: what ended the round.

        """
        ended: list[Trajectory] = []
        if self._has_ended:
            return ended
        match item:
            case Exception():
                raise item
            case HookAnswer():
                self._take_answer(item)
            case VersionChanged():
                self._note_version()
            case None:  # a fork goes on, or is over
                self._is_released = False
            case Prepared():
                with self._discarding_unfit():
                    for prompts in self._fresh.take(item, self._book.store.totals.cursor):
                        self._add_fresh(prompts)
            case _:
                ended = self._take_output(item)
        if self._boundaries is not None:
            self._submit(self._boundaries.go_on_forking())
        self._judge(self._round.complete())
        self._advance()
        return ended

    def ready_groups(self) -> dict[int, Group]:
        """The next group that a stream may give to its caller, on the disk by now; empty if there is none."""
        self._note_version()
        ready = self._round.ready(1)
        if ready:
            self._book.store.flush()
        return ready

    def taken(self, serial: int) -> None:
        """A stream's caller has a group."""
        if serial in self._book.store.banked:
            self._book.store.take(serial)
            self._advance()

    @property
    def filtered_reasons(self) -> dict[str, int]:
        """How many groups were refused so far, by reason."""
        return self._round.filtered_reasons

    def progress(self) -> Future[dict[str, Any]] | None:
        """Ask the scheduler for the numbers of the current wave, if there is one."""
        if not self._waves.ids:
            return None
        wave = self._waves.ids[-1]
        return self._driver.call_later(lambda link: link.rpc("round", round=wave))

    def finish(self) -> Future[Round | None]:
        """Once it is over: the round, on the disk if there is a journal; `None` if new weights came in between."""
        self._is_finishing = True
        return self._driver.call_later(self._finish)

    def received(self) -> None:
        """The caller has the round; until then it is the next round's again."""
        self._book.store.recovered = None

    @property
    def has_ended(self) -> bool:
        """Nothing of it is left: it was finished, ended or cancelled."""
        return self._has_ended

    @property
    def is_stopping(self) -> bool:
        """`stop` was called, and some of its members have not come back yet."""
        return self._num_groups == 0 and self._round.num_running > 0

    def stop(self) -> None:
        """Let no group run any more: members in the engine are cut and come back, to be carried with their tokens."""
        self._num_groups = 0
        self._close_wave()

    def end(self) -> None:
        """A stream that was stopped is over; nothing of it is left in the scheduler."""
        if not self._has_ended:
            with contextlib.suppress(EngineDeadError):
                self._driver.call_later(self._waves.forget)
            self._book.store.flush()
            self._end()

    def cancel(self) -> None:
        """Stop the round unless it ended. Its groups are carried, with the tokens that were taken in."""
        if self._has_ended:
            return

        def stop(link: CoreLink) -> None:
            self._waves.close(link)
            self._driver.abandon(requests)
            self._waves.forget(link)

        requests = self._round.requests() if self._waves.ids else []
        if self._waves.ids:
            with contextlib.suppress(EngineDeadError):
                self._driver.call_later(stop)
        self._end()

    def ask_fork(self, trajectory_id: str, at: int | None, n: int, seeds: Sequence[int] | None) -> Fork | None:
        """See `RoundRun.ask_fork`."""
        if not self._can_fork or self._recovered is not None:
            raise InvalidInputError("fork", "a round that was begun with can_fork=True", trajectory_id)
        self._check_not_over()
        return self._forks.ask(trajectory_id, at, n, seeds)

    def take_fork(self, fork: Fork) -> list[str] | None:
        """See `RoundRun.take_fork`."""
        self._check_not_over()
        taken = self._forks.take(fork)
        if taken is None:
            return None
        ids, plans = taken
        self._submit(plans)
        return ids

    def end_fork(self, fork: Fork) -> None:
        """See `RoundRun.end_fork`."""
        self._forks.end(fork)
        self._is_released = True
        self._deliver(None)

    def _check_not_over(self) -> None:
        if self._has_ended or self._is_finishing:
            raise InvalidInputError("fork", "a round that is not over", self.round_id)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _take_output(self, output: RequestOutput) -> list[Trajectory]:
        whole: list[Trajectory] = []
        left = [output]
        while left:
            output = left.pop()
            if (found := self._round.running(output.request_id)) is None:
                continue
            plan, serial = found
            if (trajectory := self._take_one(plan, serial, output)) is not None:
                left += self._orphans.of(str(serial), plan.index)
                if trajectory.ended_by_itself:
                    whole.append(masked(trajectory, self._book.config.bound, self._round.version))
        return whole

    def _take_one(self, plan: MemberPlan, serial: int, output: RequestOutput) -> Trajectory | None:
        """What a member has at its final output; `None` if it did not begin, or left one that runs."""
        (completion,) = output.outputs
        if completion.finish_reason == "abort" and completion.stop_reason not in _OUR_STOP_REASONS:
            # Nobody here asked for it, and it has no report: its group goes on from what the store has.
            raise EngineDeadError("rollout", "it aborted a member that was not cut, as when it is told to shut down")
        report = report_of(output.kv_transfer_params)
        if report is not None and report.is_unborn and completion.stop_reason == CUT_STOP_REASON:
            self._round.end_unborn(output.request_id)
            self._waves.note_cut(plan.metadata.round)
            return None
        if report is not None and report.birth is not None:
            if isinstance(born := self._round.be_born(output.request_id, report.birth), int):
                self._orphans.wait(str(serial), born, output)
                return None
            plan = born
        segment = segment_of(plan, output)
        if segment.ended_by_itself or segment.is_paused:
            segment = with_whole_text(self._driver.engine.tokenizer, plan, segment)
        num_computed, boundary = (0, None) if report is None else (report.num_computed_tokens, report.boundary)
        whole = self._round.end(output.request_id, segment, num_computed, boundary)
        if whole.was_cut:
            self._waves.note_cut(plan.metadata.round)
        if whole.is_paused and self._boundaries is not None:
            self._boundaries.ask(self._book.store.carried[serial], plan.index)
        if whole.ended_by_itself and self._book.judging is not None:
            group = self._book.store.carried.get(serial)
            if group is not None:
                self._book.judging.see_member(group, plan.index)
        return whole

    def _take_answer(self, answer: HookAnswer) -> None:
        assert self._book.judging is not None
        serial, attempt = answer.key
        group = self._book.store.carried.get(serial)
        if group is None or group.num_restarts != attempt:
            return
        members, verdict = self._book.judging.poll(answer.key)
        for index, member in members.items():
            self._round.replace_member(serial, index, member)
        if self._boundaries is not None:
            self._submit(self._boundaries.decide(group))
        if verdict is not None:
            self._round.judge(serial, verdict.group.trajectories, verdict.rejected, verdict.group.metadata)

    def _judge(self, groups: Sequence[GroupState]) -> None:
        for group in groups:
            assert self._book.judging is not None
            self._book.judging.see_group(group, self.round_id)

    def _advance(self) -> None:
        """Give up what the bound refused, let groups run as far as there is room, or stop a round that is full."""
        self._drop_refused()
        if self._round.is_full:
            self._close_wave()
            return
        if self._num_missing <= 0 or (self._waves.ids and not self._waves.is_open and self._round.num_running):
            return
        self._start(self._round.waiting()[: self._num_missing])
        if self._num_missing > 0:
            with self._discarding_unfit():
                self._add_fresh(self._fresh.draw(self._num_missing))

    @property
    def _num_missing(self) -> int:
        """Groups that there is room for."""
        return self._num_groups - self._round.num_in_play - self._fresh.num_preparing

    def _close_wave(self) -> None:
        if self._waves.is_open:
            self._waves.is_open = False
            self._driver.call_later(self._waves.close)

    @contextlib.contextmanager
    def _discarding_unfit(self) -> Iterator[None]:
        try:
            yield
        except InvalidInputError:
            engine = self._driver.engine
            self._fresh.discard_unfit(self._group_size, self._sampling, engine.tokenizer, engine.limits)
            raise

    def _add_fresh(self, prompts: Sequence[Any]) -> None:
        if not prompts:
            return
        engine, totals = self._driver.engine, self._book.store.totals
        first, serial = totals.cursor, totals.num_submitted
        checked = tokenize_prompts(prompts, self._group_size, engine.tokenizer, engine.limits, first=first)
        check_budgets(checked, self._sampling)
        groups = [
            GroupState.new(serial + i, self._round.round_no, self.round_id, prompt, self._group_size, self._sampling)
            for i, prompt in enumerate(checked)
        ]
        for group in groups:
            if group.seed is not None and group.seed + self._group_size > MAX_SEED:
                raise InvalidInputError("sampling.seed", f"room for {self._group_size} seeds", group.seed)
        self._round.add_fresh(groups, first + len(groups))
        self._fresh.source.submitted(len(groups))
        if not self._round.is_full and self._num_groups:
            self._start(groups)

    def _start(self, groups: Sequence[GroupState]) -> None:
        if not groups:
            return
        self._waves.join(len(groups), self._round.begin_wave)
        self._submit(self._round.start(groups))
        if self._boundaries is not None:
            for group in groups:
                for index in group.paused:
                    self._boundaries.ask(group, index)
        self._judge(self._round.complete())

    def _submit(self, plans: Sequence[MemberPlan]) -> None:
        if not plans:
            return
        requests = [(plan.request_id, plan.token_ids, sampling_params(plan)) for plan in plans]
        self._driver.submit(requests, self._deliver)

    def _drop_refused(self) -> None:
        """Tell the engine what the round gave up."""
        requests, keys = self._round.abort, self._round.unpark
        if not requests and not keys:
            return
        self._round.abort, self._round.unpark = [], []
        if self._book.judging is not None:
            self._book.judging.keep_only(self._book.store.carried.values())

        def drop(link: CoreLink) -> None:
            self._driver.abandon(requests)
            link.rpc("unpark", keys=keys)

        self._driver.call_later(drop)

    def _note_version(self) -> None:
        version = self._driver.weight_version
        if version != self._round.version:
            self._round.change_version(version)
            self._advance()

    def _finish(self, link: CoreLink) -> Round | None:
        with self._ending:
            if self._has_ended:
                raise RuntimeError("the round was cancelled")
            if self._recovered is not None:
                self._end()
                return masked_round(self._recovered, self._book.config.bound, self._driver.weight_version)
            if self._driver.weight_version != self._round.version:
                self._is_finishing = False
                return None
            return self._finish_round(link)

    def _finish_round(self, link: CoreLink) -> Round:
        self._drop_refused()
        counts = self._waves.forget(link)
        ready = self._round.ready(self._target_groups)
        groups = list(ready.values())
        carry = self._round.stats(groups)
        round_ = Round(
            round_id=self.round_id,
            target_groups=self._target_groups or len(groups),
            groups=groups,
            filtered_groups=self._round.filtered,
            carry=carry,
            stats=round_stats(carry, groups, counts, self._round, time.monotonic() - self._started),
        )
        self._book.store.end_round(round_, list(ready))
        self._policy.observe(
            RoundOutcome(
                num_started=round_.stats.num_submitted_groups,
                num_accepted=carry.num_accepted,
                num_filtered=carry.num_filtered,
                num_banked=carry.num_banked,
                num_preemptions=self._round.num_preemptions,
                peak_kv_usage=max((count["peak_kv_usage"] for count in counts), default=0.0),
            )
        )
        self._end()
        return round_

    def _end(self) -> None:
        with self._ending:
            if self._has_ended:
                return
            self._has_ended = True
        self._book.inbox.detach()
        if self._boundaries is not None:
            self._boundaries.close()
        self._book.leftover = self._fresh.source.unsubmitted
        self._book.is_busy = False
        self._driver.release_round(self.round_id)
