"""One round in flight on a driver: what the synchronous and the asyncio facade have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec

from longtail.engine.config import SamplingConfig
from longtail.engine.driver import EngineDriver
from longtail.engine.errors import EngineDeadError, InvalidInputError
from longtail.engine.forks import Fork, ask_scheduler, check_fork, check_position
from longtail.engine.round_collector import RoundCollector
from longtail.engine.rounds import MemberPlan, RoundPlan, plan_round
from longtail.engine.segments import trajectory_at
from longtail.engine.trajectory import Round, Trajectory
from longtail.engine.trajectory_parts import branches
from longtail.engine.vllm_args import sampling_params
from longtail.scheduler.fork_order import ForkOrder

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

    from longtail.engine.core_link import CoreLink


class RoundProgress(msgspec.Struct, frozen=True, kw_only=True):
    """A running round in numbers, as the scheduler sees it now.

    Attributes:
        num_output_tokens: output tokens of the members that have not finished yet.
        num_steps: engine steps so far; see `RoundStats` for `idle_slot_steps`.
        num_running: requests that run in the engine, of this round or not.
        num_waiting: requests that wait to run.

    """

    num_complete_groups: int
    num_live_members: int
    num_cut_members: int
    num_output_tokens: int
    num_steps: int
    idle_slot_steps: int
    peak_running: int
    num_running: int
    num_waiting: int


class RoundRun:
    """Submits a checked round and collects it. Final outputs go to `deliver` in the driver's thread."""

    def __init__(
        self,
        driver: EngineDriver,
        prompts: Sequence[Any],
        *,
        group_size: int,
        target_groups: int | None,
        over_provision: float | None,
        sampling: SamplingConfig,
        round_id: str | None,
        can_fork: bool = False,
    ) -> None:
        self._driver = driver
        self.plan: RoundPlan = plan_round(
            prompts,
            group_size=group_size,
            target_groups=target_groups,
            over_provision=over_provision,
            sampling=sampling,
            round_id=round_id,
            tokenizer=driver.engine.tokenizer,
            limits=driver.engine.limits,
            can_fork=can_fork,
        )
        self._collector = RoundCollector(self.plan, driver.engine.tokenizer)
        self._ended = False
        self._is_finishing = False
        driver.claim_round(self.plan.round_id)

    def settle(self) -> bool:
        """Whether every member has its final output."""
        return not self._collector.num_pending

    def received(self) -> None:
        """The caller has the round."""

    def submit(self, deliver: Callable[[Any], object]) -> None:
        """Hand every member to the engine."""
        self._deliver = deliver
        self._submit(self.plan.members())

    def _submit(self, members: Iterable[MemberPlan]) -> None:
        requests = [(member.request_id, member.token_ids, sampling_params(member)) for member in members]
        self._driver.submit(requests, self._deliver)

    def take(self, item: RequestOutput | Exception | None) -> list[Trajectory]:
        """Turn what `deliver` got into trajectories, or raise it."""
        if isinstance(item, Exception):
            raise item
        if item is None or self._ended:
            return []
        return self._collector.take(item)

    def ask_fork(self, trajectory_id: str, at: int | None, n: int, seeds: Sequence[int] | None) -> Fork | None:
        """Ask the scheduler to fork a trajectory; `None` while another fork is not taken.

        Raises:
            InvalidInputError: an argument is wrong, or the round takes no forks.

        """
        if not self.plan.can_fork:
            raise InvalidInputError("fork", "a round that was begun with can_fork=True", trajectory_id)
        self._check_not_over()
        if self._collector.num_forking:
            return None
        member, ended = self._collector.find(trajectory_id)
        check_fork(at, n, seeds, max_tokens=member.max_tokens, ended=ended)
        first = self._collector.num_members(member.prompt.group_id)
        indices = range(first, first + n)
        order = ForkOrder(
            of=trajectory_id,
            keys=[_sibling_id(trajectory_id, index) for index in indices],
            at=at,
            num_prompt_tokens=len(member.prompt.token_ids),
            round=self.plan.round_id,
            group=member.metadata.group,
        )
        fork = Fork(trajectory_id, indices, seeds, order, ask_scheduler(self._driver, order))
        self._collector.num_forking += 1
        return fork

    def take_fork(self, fork: Fork) -> list[str] | None:
        """Once it is answered: submit the branches and return their ids.

        `None` if that can't be yet. Take the next item, unless the scheduler was asked again, and try again.

        Raises:
            InvalidInputError: the scheduler refused.

        """
        point = fork.answer.result()
        self._check_not_over()
        member, ended = self._collector.find(fork.trajectory_id)
        if ended is None and not point.is_live:
            return None
        # It may have had fewer tokens than that when it ended.
        check_position(point.at, max_tokens=member.max_tokens, ended=ended)
        parent = trajectory_at(member, point) if ended is None else ended
        ids = {index: _sibling_id(fork.trajectory_id, index) for index in fork.indices}
        new = branches(parent, point.at, ids, fork.seeds_after(member.seed))
        self._submit(self._collector.expect(new, member, point))
        fork.is_taken = True
        return list(ids.values())

    def end_fork(self, fork: Fork) -> None:
        """It was taken, or is given up; the round may have waited for nothing else."""
        self._collector.num_forking -= 1
        fork.give_up(self._driver)
        self._deliver(None)

    def _check_not_over(self) -> None:
        if self._ended or self._is_finishing:
            raise InvalidInputError("fork", "a round that is not over", self.plan.round_id)

    def progress(self) -> Future[dict[str, Any]]:
        """Ask the scheduler for the round's numbers."""
        return self._driver.call_later(lambda link: link.rpc("round", round=self.plan.round_id))

    def finish(self) -> Future[Round | None]:
        """Once nothing is pending: take the scheduler's numbers and forget the round there."""
        self._is_finishing = True

        def take_numbers(link: CoreLink) -> Round | None:
            counts = self._forget(link)
            self._end()
            return self._collector.round(counts)

        return self._driver.call_later(take_numbers)

    def cancel(self) -> None:
        """Stop and forget the round unless it ended; final outputs still to come go nowhere."""
        if self._ended:
            return

        def stop(link: CoreLink) -> None:
            link.rpc("close_round", round=self.plan.round_id)
            # Its outputs have the ids of the next round that is called the same.
            self._driver.abandon(self._collector.request_ids)
            self._forget(link)

        with contextlib.suppress(EngineDeadError):
            self._driver.call_later(stop)
        # Only now: what the next round of this id submits comes after.
        self._end()

    def _forget(self, link: CoreLink) -> dict[str, Any]:
        """Leave nothing of the round in the scheduler; returns its last numbers."""
        if self.plan.parks:
            link.rpc("unpark", keys=self._collector.request_ids)
        return link.rpc("forget_round", round=self.plan.round_id)

    def _end(self) -> None:
        self._ended = True
        self._driver.release_round(self.plan.round_id)


def _sibling_id(trajectory_id: str, index: int) -> str:
    return f"{trajectory_id.rpartition('/')[0]}/{index}"


def as_progress(counts: dict[str, Any]) -> RoundProgress:
    """`rollout_rpc("round")`'s answer as a struct."""
    return RoundProgress(**{name: counts[name] for name in RoundProgress.__struct_fields__})
