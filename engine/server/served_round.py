"""One round of `POST /v1/rollouts`: its members run through vLLM's asyncio engine, its trajectories come out as lines.

A member is one `generate` task, so that vLLM's own front end does admission, detokenisation and statistics. The round
belongs to its stream: when nobody reads it any more, the round is closed in the scheduler and forgotten there.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from longtail.engine.errors import EngineDeadError, LongtailError
from longtail.engine.rounds import MemberPlan, RoundCollector, RoundPlan
from longtail.engine.server.bodies import ErrorLine, RoundLine, encode_line, trajectory_line
from longtail.engine.server.problems import problem
from longtail.engine.server.scheduler_link import SchedulerLink

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

#: Members that are handed to the engine before other requests of the server get their turn.
_SUBMIT_BATCH = 32
_CANCEL_TIMEOUT_S = 10.0


class ServedRound:
    """Collects a planned round.

    Args:
        engine: vLLM's engine client.
        link: to the scheduler of the same engine.
        plan: the checked round; its id is not in use.
        stall_timeout_s: how long the engine may take for one step.

    """

    def __init__(self, engine: AsyncLLM, link: SchedulerLink, plan: RoundPlan, stall_timeout_s: float) -> None:
        self._engine = engine
        self._link = link
        self._plan = plan
        self._stall_timeout_s = stall_timeout_s
        self._collector = RoundCollector(plan)
        self._ended: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        self._members: set[asyncio.Task[None]] = set()
        self._submission: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to submit the members."""
        self._submission = asyncio.create_task(self._submit())

    async def lines(self) -> AsyncIterator[bytes]:
        """A line for each trajectory as it ends, then one for the round, or for the error that ended it."""
        try:
            while self._collector.num_pending:
                ended = await self._next_ended()
                if isinstance(ended, Exception):
                    raise ended
                yield encode_line(trajectory_line(self._collector.add(ended)))
            counts = await self._link.rpc("round", round=self._plan.round_id)
            stats = self._collector.round(counts).stats
            yield encode_line(
                RoundLine(round_id=self._plan.round_id, target_groups=self._plan.target_groups, stats=stats)
            )
        except Exception as error:  # headers are sent: whatever it is, the client must see it
            yield encode_line(ErrorLine(round_id=self._plan.round_id, error=problem(self._as_ours(error))))

    async def end(self) -> None:
        """Leave nothing of the round in the engine, finished or not. Raises nothing that the engine does wrong."""
        if self._submission is not None:
            self._submission.cancel()
        try:
            if self._members:
                await self._link.rpc("close_round", timeout_s=_CANCEL_TIMEOUT_S, round=self._plan.round_id)
                await asyncio.wait(self._members, timeout=_CANCEL_TIMEOUT_S)
        except LongtailError:
            pass  # the scheduler has no such round yet, or there is no scheduler any more
        for task in self._members:
            task.cancel()
        await asyncio.gather(*self._members, return_exceptions=True)
        try:
            await self._link.rpc("forget_round", timeout_s=_CANCEL_TIMEOUT_S, round=self._plan.round_id)
        except LongtailError:
            pass  # members that came by another route still run in it, or there is no scheduler any more

    async def _submit(self) -> None:
        from longtail.engine.vllm_args import sampling_params

        members = self._plan.members()
        while batch := list(itertools.islice(members, _SUBMIT_BATCH)):
            for member in batch:
                params = sampling_params(self._plan.sampling, member.seed, member.metadata)
                task = asyncio.create_task(self._run_member(member, params))
                self._members.add(task)
                task.add_done_callback(self._members.discard)
            await asyncio.sleep(0)

    async def _run_member(self, member: MemberPlan, params: SamplingParams) -> None:
        prompt: Any = {"type": "token", "prompt_token_ids": member.prompt.token_ids}
        try:
            async for output in self._engine.generate(prompt, params, member.request_id):
                if output.finished:
                    self._ended.put_nowait(output)
        except Exception as error:
            self._ended.put_nowait(error)

    async def _next_ended(self) -> RequestOutput | Exception:
        """The next member that ended. While none does, ask for a sign of life: a long answer is not a stall."""
        while True:
            try:
                return await asyncio.wait_for(self._ended.get(), self._stall_timeout_s)
            except TimeoutError:
                await self._link.rpc("counters", timeout_s=self._stall_timeout_s)

    def _as_ours(self, error: Exception) -> Exception:
        from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

        if isinstance(error, (VllmEngineDeadError, EngineDeadError)):
            return EngineDeadError("rollout", "its process ended", self._collector.num_pending)
        return error
