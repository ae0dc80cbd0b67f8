"""One round in flight on a driver: what the synchronous and the asyncio facade have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec

from longtail.engine.config import SamplingConfig
from longtail.engine.driver import EngineDriver
from longtail.engine.errors import EngineDeadError, InvalidInputError
from longtail.engine.rounds import RoundCollector, RoundPlan, plan_round
from longtail.engine.trajectory import Round, Trajectory
from longtail.engine.vllm_args import sampling_params

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

RPC_TIMEOUT_S = 60.0


class RoundProgress(msgspec.Struct, frozen=True, kw_only=True):
    """A running round in numbers, as the scheduler sees it now.

    Attributes:
        num_output_tokens: output tokens of the members that have not finished yet.
        num_steps: engine steps so far; see `RoundStats` for `idle_slot_steps`.

    """

    num_complete_groups: int
    num_live_members: int
    num_cut_members: int
    num_output_tokens: int
    num_steps: int
    idle_slot_steps: int
    peak_running: int


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
        if not isinstance(sampling, SamplingConfig):
            raise InvalidInputError("sampling", "a SamplingConfig", sampling)
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
        self.collector = RoundCollector(self.plan)

    def submit(self, deliver: Callable[[RequestOutput | Exception], None]) -> None:
        """Hand every member to the engine."""
        sampling = self.plan.sampling
        self._driver.submit(
            [
                (member.request_id, member.prompt.token_ids, sampling_params(sampling, member))
                for member in self.plan.members()
            ],
            deliver,
        )

    def take(self, item: RequestOutput | Exception) -> Trajectory:
        """Turn what `deliver` got into a trajectory, or raise it."""
        if isinstance(item, Exception):
            raise item
        return self.collector.add(item)

    def progress(self) -> Future[dict[str, Any]]:
        """Ask the scheduler for the round's numbers."""
        return self._driver.call_later(lambda link: link.rpc("round", round=self.plan.round_id))

    def finish(self) -> Future[Round]:
        """Once nothing is pending: take the scheduler's numbers and forget the round there."""
        return self._driver.call_later(
            lambda link: self.collector.round(link.rpc("forget_round", round=self.plan.round_id))
        )

    def cancel(self) -> None:
        """Stop the members that are still running; their final outputs go nowhere."""

        def close(link: Any) -> None:
            link.rpc("close_round", round=self.plan.round_id)

        if self.collector.num_pending:
            try:
                self._driver.call_later(close)
            except EngineDeadError:
                return


def as_progress(counts: dict[str, Any]) -> RoundProgress:
    """`rollout_rpc("round")`'s answer as a struct."""
    return RoundProgress(**{name: counts[name] for name in RoundProgress.__struct_fields__})
