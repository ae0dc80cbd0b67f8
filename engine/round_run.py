"""One round in flight on a driver: what the synchronous and the asyncio facade have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec

from longtail.engine.config import SamplingConfig
from longtail.engine.driver import EngineDriver, Sink
from longtail.engine.errors import EngineDeadError
from longtail.engine.rounds import RoundCollector, RoundPlan, plan_round
from longtail.engine.trajectory import Round, Trajectory
from longtail.engine.vllm_args import sampling_params

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
        )
        self._collector = RoundCollector(self.plan)
        self._ended = False
        driver.claim_round(self.plan.round_id)

    def settle(self) -> bool:
        """Whether every member has its final output."""
        return not self._collector.num_pending

    def received(self) -> None:
        """The caller has the round."""

    def submit(self, deliver: Sink) -> None:
        """Hand every member to the engine."""
        requests = [(member.request_id, member.token_ids, sampling_params(member)) for member in self.plan.members()]
        self._driver.submit(requests, deliver)

    def take(self, item: RequestOutput | Exception) -> list[Trajectory]:
        """Turn what `deliver` got into a trajectory, or raise it."""
        if isinstance(item, Exception):
            raise item
        return [self._collector.add(item)]

    def progress(self) -> Future[dict[str, Any]]:
        """Ask the scheduler for the round's numbers."""
        return self._driver.call_later(lambda link: link.rpc("round", round=self.plan.round_id))

    def finish(self) -> Future[Round | None]:
        """Once nothing is pending: take the scheduler's numbers and forget the round there."""

        def take_numbers(link: CoreLink) -> Round | None:
            counts = link.rpc("forget_round", round=self.plan.round_id)
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
            self._driver.abandon(member.request_id for member in self.plan.members())
            link.rpc("forget_round", round=self.plan.round_id)

        with contextlib.suppress(EngineDeadError):
            self._driver.call_later(stop)
        # Only now: what the next round of this id submits comes after.
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._driver.release_round(self.plan.round_id)


def as_progress(counts: dict[str, Any]) -> RoundProgress:
    """`rollout_rpc("round")`'s answer as a struct."""
    return RoundProgress(**{name: counts[name] for name in RoundProgress.__struct_fields__})
