"""The routes under `/v1/rollouts`.

    POST   /v1/rollouts              run a round; NDJSON, a line for each trajectory as it ends, then one for the round
    GET    /v1/rollouts/{round_id}   the numbers of a live round, now
    DELETE /v1/rollouts/{round_id}   end a live round; its stream then ends with what there is

Everything wrong with a request is answered before its first member is submitted. A client that goes away ends its
round.
"""

from __future__ import annotations

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from longtail.engine.errors import InvalidInputError
from longtail.engine.prompts import PromptLimits, Tokenizer
from longtail.engine.rounds import RoundPlan, plan_round
from longtail.engine.server.bodies import RolloutBody, parse_body
from longtail.engine.server.json_door import SCOPE_KEY
from longtail.engine.server.problems import RoundConflictError, UnknownRoundError
from longtail.engine.server.scheduler_link import SchedulerLink, core_ended
from longtail.engine.server.served_round import ServedRound

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

NDJSON = "application/x-ndjson"

#: Response header with the round's id, percent-encoded: a client that gave none needs it to end its round.
ROUND_HEADER = "X-Longtail-Round"

router = APIRouter()


class RolloutService:
    """The rounds of one server."""

    def __init__(self, engine: AsyncLLM, link: SchedulerLink, *, max_members: int, stall_timeout_s: float) -> None:
        self._engine = engine
        self._link = link
        self._max_members = max_members
        self._stall_timeout_s = stall_timeout_s
        model = engine.model_config
        self._limits = PromptLimits(model.get_vocab_size(), model.max_model_len)
        # A fast tokenizer is not thread-safe: a copy of our own, used in one thread of our own.
        self._tokenizer: Tokenizer | None = None if model.skip_tokenizer_init else copy.deepcopy(engine.get_tokenizer())
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="longtail-plan")
        self._live: set[str] = set()

    async def open(self, body: Any) -> ServedRound:
        """Check a request, given as decoded JSON, and start its round.

        Raises:
            InvalidInputError: names the field; nothing was submitted.
            RoundConflictError: the round id is in use.
            EngineDeadError, EngineTimeoutError: the engine core does not answer.

        """
        if self._link.is_dead:
            raise core_ended()
        plan = await asyncio.get_running_loop().run_in_executor(self._planner, self._plan, body)
        round_id = plan.round_id
        if round_id in self._live:
            raise RoundConflictError("round_id", "an id that no live round has", round_id)
        self._live.add(round_id)
        try:
            await self._check_free(round_id)
            await self._check_request(plan)
        except BaseException:
            self._live.discard(round_id)
            raise
        served = ServedRound(
            self._engine,
            self._link,
            plan,
            # In the thread of the event loop, where vLLM uses it too.
            None if self._tokenizer is None else self._engine.get_tokenizer(),
            stall_timeout_s=self._stall_timeout_s,
            on_end=lambda: self._live.discard(round_id),
        )
        served.start()
        return served

    async def numbers(self, round_id: str) -> dict[str, Any]:
        """What the scheduler says of a round."""
        return await self._ask("round", round_id)

    async def cancel(self, round_id: str) -> dict[str, Any]:
        """Stop the live members of a round; its numbers after that."""
        return await self._ask("close_round", round_id)

    async def _ask(self, op: str, round_id: str) -> dict[str, Any]:
        try:
            return {"round_id": round_id} | await self._link.rpc(op, round=round_id)
        except InvalidInputError as error:
            raise UnknownRoundError("round_id", "the id of a live round", round_id) from error

    def _plan(self, body: Any) -> RoundPlan:
        request: RolloutBody = parse_body(body)
        return plan_round(
            request.checked_prompts(),
            group_size=request.group_size,
            target_groups=request.target_groups,
            over_provision=request.over_provision,
            sampling=request.checked_sampling(),
            round_id=request.round_id,
            tokenizer=self._tokenizer,
            limits=self._limits,
            max_members=self._max_members,
        )

    async def _check_free(self, round_id: str) -> None:
        """Refuse an id that the scheduler knows: members of it came through another route."""
        try:
            await self._link.rpc("round", round=round_id)
        except InvalidInputError:
            return
        raise RoundConflictError("round_id", "an id that no live round has", round_id)

    async def _check_request(self, plan: RoundPlan) -> None:
        """Let vLLM refuse the sampling parameters before the answer has begun."""
        from vllm.exceptions import VLLMClientError

        from longtail.engine.vllm_args import sampling_params

        member = next(plan.members())
        prompt: Any = {"type": "token", "prompt_token_ids": member.token_ids}
        try:
            self._engine.input_processor.process_inputs(
                member.request_id,
                prompt,
                sampling_params(member),
                supported_tasks=await self._engine.get_supported_tasks(),
            )
        except (VLLMClientError, ValueError) as error:
            parameter = getattr(error, "parameter", None)
            field = "sampling" if parameter is None else f"sampling.{parameter}"
            raise InvalidInputError(field, f"what vLLM takes ({error})", plan.sampling) from error


class _RoundResponse(StreamingResponse):
    """Streams a round, and ends it at once when the client goes away."""

    def __init__(self, served: ServedRound) -> None:
        headers = {ROUND_HEADER: quote(served.round_id, safe="")}
        super().__init__(served.lines(), media_type=NDJSON, headers=headers)
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        streaming = asyncio.ensure_future(self.stream_response(send))
        leaving = asyncio.ensure_future(self.listen_for_disconnect(receive))
        try:
            await asyncio.wait((streaming, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._served.end()
            streaming.cancel()
            leaving.cancel()
            await asyncio.gather(streaming, leaving, return_exceptions=True)


@router.post("/v1/rollouts", response_class=StreamingResponse)
async def create_rollout(request: Request) -> StreamingResponse:
    """Run a round and stream its trajectories."""
    if SCOPE_KEY not in request.scope:
        raise InvalidInputError("body", "an object", "nothing")
    return _RoundResponse(await _service(request).open(request.scope[SCOPE_KEY]))


@router.get("/v1/rollouts/{round_id:path}")
async def show_rollout(round_id: str, request: Request) -> JSONResponse:
    """The numbers of a live round."""
    return JSONResponse(await _service(request).numbers(round_id))


@router.delete("/v1/rollouts/{round_id:path}")
async def cancel_rollout(round_id: str, request: Request) -> JSONResponse:
    """End a live round now."""
    return JSONResponse(await _service(request).cancel(round_id))


def _service(request: Request) -> RolloutService:
    return cast(RolloutService, request.app.state.longtail_rollouts)
