"""One round of `POST /v1/rollouts`: its members run through vLLM's asyncio engine, its trajectories come out as lines.

A member is one `generate` task, so that vLLM's own front end does admission, detokenisation and statistics. The round
belongs to its stream: when nobody reads it any more, it is closed and forgotten in the scheduler.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from longtail.engine.errors import EngineDeadError, LongtailError
from longtail.engine.prompts import Tokenizer
from longtail.engine.round_collector import RoundCollector
from longtail.engine.rounds import MemberPlan, RoundPlan
from longtail.engine.server.bodies import ErrorLine, RoundLine, encode_line, trajectory_line
from longtail.engine.server.problems import problem
from longtail.engine.server.scheduler_link import SchedulerLink, core_ended

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

#: Members that are handed to the engine before other requests of the server get their turn.
_SUBMIT_BATCH = 32
_END_TIMEOUT_S = 10.0
_SIGN_OF_LIFE_S = 60.0


class ServedRound:
    """Collects a planned round.

    Args:
        engine: vLLM's engine client.
        link: to the scheduler of the same engine.
        plan: the checked round; its id is not in use.
        tokenizer: the engine's, if it has one.
        stall_timeout_s: how long the engine may take for one step.
        on_end: called once, when nothing of the round is left in the engine.

    """

    def __init__(
        self,
        engine: AsyncLLM,
        link: SchedulerLink,
        plan: RoundPlan,
        tokenizer: Tokenizer | None,
        *,
        stall_timeout_s: float,
        on_end: Callable[[], None],
    ) -> None:
        self.round_id = plan.round_id
        self._engine = engine
        self._link = link
        self._plan = plan
        self._stall_timeout_s = stall_timeout_s
        self._on_end = on_end
        self._collector = RoundCollector(plan, tokenizer)
        self._ended: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        self._members: set[asyncio.Task[None]] = set()
        self._submission: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

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
                for trajectory in self._collector.take(ended):
                    yield encode_line(trajectory_line(trajectory))
            counts = await self._link.rpc("round", round=self.round_id)
            stats = self._collector.round(counts).stats
            last: RoundLine | ErrorLine = RoundLine(
                round_id=self.round_id, target_groups=self._plan.target_groups, stats=stats
            )
        except Exception as error:  # the status is sent: whatever it is, the client must see it here
            last = ErrorLine(round_id=self.round_id, error=problem(self._as_ours(error)))
        # First, so that a client that has the last line may use the id again.
        await asyncio.shield(self.end())
        yield encode_line(last)

    def end(self) -> asyncio.Task[None]:
        """Leave nothing of the round in the engine, finished or not; runs on when the caller is cancelled."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        return self._ending

    async def _end(self) -> None:
        try:
            if self._submission is not None:
                self._submission.cancel()
            # A copy: members end, and leave the set, while the scheduler is asked.
            members = set(self._members)
            if members and await self._ask("close_round"):
                await asyncio.wait(members, timeout=_END_TIMEOUT_S)
            for task in members:
                task.cancel()
            await asyncio.gather(*members, return_exceptions=True)
            if self._plan.parks:
                await self._ask("unpark", keys=self._collector.request_ids)
            # Refused while members that came by another route still run in it: then the scheduler's bound applies.
            await self._ask("forget_round")
        finally:
            self._on_end()

    async def _ask(self, op: str, **args: Any) -> bool:
        """Whether the scheduler is there and knows the round."""
        try:
            await self._link.rpc(op, timeout_s=_END_TIMEOUT_S, round=self.round_id, **args)
        except LongtailError:
            return False
        return True

    async def _submit(self) -> None:
        from longtail.engine.vllm_args import sampling_params

        members = self._plan.members()
        while batch := list(itertools.islice(members, _SUBMIT_BATCH)):
            for member in batch:
                params = sampling_params(member)
                task = asyncio.create_task(self._run_member(member, params))
                self._members.add(task)
                task.add_done_callback(self._members.discard)
            await asyncio.sleep(0)

    async def _run_member(self, member: MemberPlan, params: SamplingParams) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        prompt: Any = {"type": "token", "prompt_token_ids": member.token_ids}
        try:
            # Not an override's: what the scheduler refuses is a trajectory here, not an error of the whole round.
            async for output in AsyncLLM.generate(self._engine, prompt, params, member.request_id):
                if output.finished:
                    self._ended.put_nowait(output)
        except Exception as error:
            self._ended.put_nowait(error)

    async def _next_ended(self) -> RequestOutput | Exception:
        """The next member that ended. While none does, ask for a sign of life: a long answer is not a stall."""
        while True:
            try:
                return await asyncio.wait_for(self._ended.get(), min(_SIGN_OF_LIFE_S, self._stall_timeout_s))
            except TimeoutError:
                await self._link.rpc("counters", timeout_s=self._stall_timeout_s)

    def _as_ours(self, error: Exception) -> Exception:
        from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError

        if isinstance(error, (VllmEngineDeadError, EngineDeadError)):
            return core_ended(self._collector.num_pending)
        return error
