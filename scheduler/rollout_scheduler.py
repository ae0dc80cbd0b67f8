"""The adapter: vLLM's V1 scheduler plus rounds that it cuts itself.

`RolloutMixin` overrides eight named methods of `vllm.v1.core.sched.scheduler.Scheduler`. Which members count, and when
a round is cut, is `RoundBook`'s to decide; what becomes of their KV is `RolloutKv`'s. A request without rollout
metadata takes stock vLLM's path, and an engine without any pays one empty-dict test a step.

An exception that leaves a scheduler method kills the engine core and every request in it. So whatever comes
from outside is parsed before anything is enqueued, and what is wrong is answered with a final output whose
finish reason is `error` and whose stop reason names the field.

Only `add_request`, `schedule`, `_get_local_prefix_cache_hit`, `update_from_output`, `finish_requests`,
`_preempt_request`, `_free_blocks` and `has_requests` may be called by vLLM; `rollout_rpc` is called by the front end
through the ledger's method on `EngineCore`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from longtail.scheduler.boundaries import BOUNDARY_STOP_REASON, BoundarySpec
from longtail.scheduler.boxed import BOXED_STOP_REASON
from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.forking import Forking
from longtail.scheduler.member import Member
from longtail.scheduler.member_requests import (
    attach_report,
    check_request,
    empty_output,
    keep_first,
    restore,
    tell_worker,
)
from longtail.scheduler.metadata import CUT_STOP_REASON, metadata_of
from longtail.scheduler.rollout_kv import RolloutKv
from longtail.scheduler.rounds import Admission, RoundBook
from longtail.scheduler.scheduler_rpc import SchedulerRpc
from longtail.scheduler.stop_strings import Hit, StopStringWatch
from longtail.scheduler.tree_place import DISMISSED_STOP_REASON
from longtail.scheduler.trees import Trees

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    _Base = Scheduler
else:
    _Base = object

#: Finish reasons of a member that ended by itself, so that its group can be complete, and its request's status then.
_NATURAL = frozenset({FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION})
_NATURAL_STATUS = frozenset(
    {RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_REPETITION}
)


class RolloutMixin(_Base):
    """Rounds for any V1 scheduler; put it before the scheduler class in the bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._book = RoundBook()
        self._members: dict[str, Member] = {}
        self._no_token_yet: set[str] = set()
        self._stop_strings = StopStringWatch(self.vllm_config.model_config)
        self._answers: list[tuple[int, EngineCoreOutput]] = []
        self._kv = RolloutKv(self)
        self._forking = Forking(self._kv, self._book)
        self._trees = Trees(self)
        self._rpc = SchedulerRpc(self)

    # ---- called by vLLM ------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        now = time.monotonic()
        try:
            metadata = metadata_of(params.extra_args if params is not None else None)
            if metadata is not None:
                check_request(metadata, request, self._kv.refusal)
                self._trees.check(metadata, request)
            admission = None if metadata is None else self._book.admit(request.request_id, metadata, now)
        except InvalidInputError as error:
            self._answer(request, FinishReason.ERROR, str(error))
            return
        if metadata is None:
            super().add_request(request)
            return
        restore(request, metadata.num_prior_tokens)
        member = Member.of(request, metadata, self._book.opened_ts(metadata.round), now)
        if admission is Admission.LATE:
            request.record_event(EngineCoreEventType.QUEUED, now)
            self._answer(request, FinishReason.ABORT, CUT_STOP_REASON, member)
            return
        self._members[request.request_id] = member
        if metadata.tree is not None:
            request.record_event(EngineCoreEventType.QUEUED, now)
            tell_worker(request, metadata)
            self._trees.arrive(member, metadata)
            return
        if metadata.can_fork:
            self._forking.enter(member)
        self.start(member)

    def start(self, member: Member) -> None:
        """Let a member run: it waits for its turn from now on."""
        request = member.request
        self._no_token_yet.add(request.request_id)
        boundary_strings = () if member.boundary is None else member.boundary.strings
        self._stop_strings.watch(request, (*member.stop, *boundary_strings), at_boxed=member.stops_at_boxed)
        super().add_request(request)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        hit = super()._get_local_prefix_cache_hit(request)
        if self._kv.has_own_hits:
            return self._kv.choose(request, self._members.get(request.request_id), hit)
        return hit

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        output = super().schedule(throttle_prefills)
        if output.finished_req_ids:
            self._kv.end(output.finished_req_ids)
        if self._members:
            self._note_batch(output)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._members:
            self._book.note_step(len(scheduler_output.num_scheduled_tokens), self.kv_cache_manager.usage)
            self._end_members(outputs)
        if self._answers:
            answers, self._answers = self._answers, []
            for client_index, output in answers:
                outputs.setdefault(client_index, EngineCoreOutputs()).outputs.append(output)
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        # Errors found inside a step get an output in that step and are counted there.
        if not self._members or finished_status is not RequestStatus.FINISHED_ABORTED:
            return super().finish_requests(request_ids, finished_status)
        unborn: list[Request] = []
        if self._trees:
            if request_ids is not None:
                request_ids = (request_ids,) if isinstance(request_ids, str) else tuple(request_ids)
            unborn = self._trees.unborn(request_ids)
        finished = super().finish_requests(request_ids, finished_status)
        for request in unborn:
            request.status = finished_status
            finished.append(request)
        for request in finished:
            if (member := self._drop_member(request.request_id)) is not None:
                self._book.leave(request.request_id)
                self._trees.end(member, None, by_itself=False)
        self._trees.settle()
        return finished

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        if (member := self._members.get(request.request_id)) is not None:
            member.end_episode()
        self._kv.end([request.request_id])
        super()._preempt_request(request, timestamp, drop_stale_output)

    def _free_blocks(self, request: Request) -> None:
        member = self._members.get(request.request_id)
        if member is not None and request.status in _NATURAL_STATUS and self._is_kept(member):
            self._kv.park(member)
        super()._free_blocks(request)

    def has_requests(self) -> bool:
        return bool(self._answers) or super().has_requests()

    def _is_kept(self, member: Member) -> bool:
        """Whether branches may need what a member has that ends by itself."""
        return member.history is not None or (bool(self._trees) and self._trees.keeps(member))

    # ---- one step ------------------------------------------------------------------------------------------

    def _note_batch(self, output: SchedulerOutput) -> None:
        """Remember when members enter the batch and what the prefix cache gave them."""
        entered = [data.req_id for data in output.scheduled_new_reqs]
        for data in output.scheduled_new_reqs:
            going_on = self._members.get(data.req_id)
            if going_on is not None and going_on.num_prior and not self.use_v2_model_runner:
                # The V2 runner gets them as `prefill_token_ids`; of V1 see `longtail.engine.patches.prior_output`.
                data.prompt_token_ids = list(going_on.request.all_token_ids)
        entered.extend(output.scheduled_cached_reqs.resumed_req_ids)
        if not entered:
            return
        now = time.monotonic()
        for request_id in entered:
            if (member := self._members.get(request_id)) is not None:
                scheduled = output.num_scheduled_tokens[request_id]
                self._kv.enter_batch(member, member.request.num_computed_tokens - scheduled, now)

    def _end_members(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Count the members that finished in this step, then cut the rounds that are complete."""
        now = time.monotonic()
        for request_id in tuple(self._no_token_yet):
            member = self._members[request_id]
            if member.num_new_tokens:
                member.first_token_ts = now
                self._no_token_yet.discard(request_id)
        for client_outputs in outputs.values():
            for output in client_outputs.outputs:
                if self._forking:
                    self._forking.note(output)
                if output.finish_reason is not None:
                    self._count_finished(output, now)
                elif (paused := self._members.get(output.request_id)) is not None and paused.boundary is not None:
                    self._look_for_boundary(paused, paused.boundary, output, now)
                elif self._stop_strings and (
                    hit := self._stop_strings.first_hit(output.request_id, output.new_token_ids)
                ):
                    self._stop_at_string(output, hit, now)
                elif self._trees:
                    self._trees.grow(output)
        if self._trees:
            self._trees.settle()
        cut = self._book.cut_ready()
        if cut:
            by_id = {output.request_id: output for group in outputs.values() for output in group.outputs}
            for request_id in cut:
                self._cut(request_id, by_id, outputs, now)
            self._trees.settle()

    def _count_finished(self, output: EngineCoreOutput, now: float) -> None:
        if (member := self._members.get(output.request_id)) is None:
            return
        if output.finish_reason in _NATURAL and (member.stop or member.stops_at_boxed):
            # What ends it may come first, or with the last token of its budget; an end token has no text. Of any other
            # member the front end finds it, and says so.
            num_texts = len(output.new_token_ids) - (output.finish_reason is FinishReason.STOP)
            hit = self._stop_strings.first_hit(output.request_id, output.new_token_ids[:num_texts])
            if hit is not None and (hit.text is None or hit.text in member.stop):
                _say_what_stopped(member, output, hit)
        self._drop_member(output.request_id)
        if output.finish_reason in _NATURAL:
            self._kv.forget(self._book.finish(output.request_id, member.num_new_tokens))
        else:
            self._book.leave(output.request_id)
        attach_report(output, member.report(now))
        self._trees.end(member, output, by_itself=output.finish_reason is FinishReason.STOP)

    def _stop_at_string(self, output: EngineCoreOutput, hit: Hit, now: float) -> None:
        """End a member at a stop string, or a boxed answer, in the step that completes it.

        The front end finds the same string with the same detokenizer and makes the final output itself, text
        trimmed as stock vLLM trims it; a finish reason from here would make it drop the last token's text. The
        abort that it sends then, one step later, finds no request. Of a string that it does not look for it gets the
        reason, and makes the whole text itself.
        """
        member = self._members[output.request_id]
        _say_what_stopped(member, output, hit)
        super().finish_requests(output.request_id, RequestStatus.FINISHED_STOPPED)
        self._drop_member(output.request_id)
        self._kv.forget(self._book.finish(output.request_id, member.num_new_tokens))
        attach_report(output, member.report(now))
        self._trees.end(member, output, by_itself=True)

    def _look_for_boundary(self, member: Member, spec: BoundarySpec, output: EngineCoreOutput, now: float) -> None:
        """Stop a member at the first boundary in its tokens of this step, unless a stop string comes first."""
        tokens = output.new_token_ids
        count = len(tokens) + 1
        made_by: str | int | None = None
        if (found := spec.first(tokens, member.request.num_output_tokens - len(tokens))) is not None:
            count, made_by = found
        hit = self._stop_strings.first_hit(output.request_id, tokens) if self._stop_strings else None
        if hit is not None and hit.num_tokens <= count:
            if hit.text not in spec.strings:
                self._stop_at_string(output, hit, now)
                return
            count, made_by = hit
        if count <= len(tokens):
            self._pause(member, output, count, made_by, now)

    def _pause(
        self, member: Member, output: EngineCoreOutput, count: int, made_by: str | int | None, now: float
    ) -> None:
        """Stop a live member after `count` of its tokens of this step; its KV is parked."""
        request = member.request
        keep_first(request, output, count)
        self._drop_member(request.request_id)
        self._kv.park(member)
        super().finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
        self._book.pause(request.request_id, member.num_new_tokens)
        output.finish_reason, output.stop_reason = FinishReason.ABORT, BOUNDARY_STOP_REASON
        attach_report(output, msgspec.structs.replace(member.report(now), boundary=made_by))

    def _cut(
        self, request_id: str, by_id: dict[str, EngineCoreOutput], outputs: dict[int, EngineCoreOutputs], now: float
    ) -> None:
        """Stop a live member in this very step, with its token of this step if it has one."""
        member = self._drop_cut(request_id)
        request = member.request
        super().finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        output = by_id.get(request_id)
        if output is None:
            output = empty_output(request, now)
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
        output.finish_reason = FinishReason.ABORT
        output.stop_reason = CUT_STOP_REASON
        attach_report(output, member.report(now))

    def _drop_cut(self, request_id: str) -> Member:
        """Forget a live member whose round is over, and park its KV."""
        member = self._drop_member(request_id)
        assert member is not None
        self._kv.park(member)
        self._trees.cut(member)
        return member

    def dismiss(self, member: Member) -> None:
        """Its tree has no branch for a member that is unborn: it ends, and its group is complete without it."""
        self._drop_member(member.request.request_id)
        self._kv.forget(self._book.dismiss(member.request.request_id))
        self._answer(member.request, FinishReason.ABORT, DISMISSED_STOP_REASON, member)

    def refuse(self, member: Member, error: InvalidInputError) -> None:
        """A member that vLLM does not know of is wrong."""
        self._drop_member(member.request.request_id)
        self._book.leave(member.request.request_id)
        self._answer(member.request, FinishReason.ERROR, str(error), member)

    def _drop_member(self, request_id: str) -> Member | None:
        member = self._members.pop(request_id, None)
        if member is not None:
            self._no_token_yet.discard(request_id)
            self._stop_strings.forget(request_id)
            self._kv.end([request_id])
            if member.history is not None:
                self._forking.leave(member)
        return member

    def _answer(
        self, request: Request, finish_reason: FinishReason, stop_reason: str, member: Member | None = None
    ) -> None:
        """Give a request that is not, or no longer, in the queues its final output in the next step."""
        now = time.monotonic()
        if member is None:
            request.record_event(EngineCoreEventType.QUEUED, now)
            member = Member(request, opened_ts=now, arrived_ts=now)
        output = empty_output(request, now)
        output.finish_reason, output.stop_reason = finish_reason, stop_reason
        attach_report(output, member.report(now))
        self._answers.append((request.client_index, output))

    # ---- called by the front end, between two steps ------------------------------------------------------------

    def rollout_rpc(self, op: str, args: dict[str, Any]) -> dict[str, Any]:
        """Answer one operation with plain msgpack types; see `SchedulerRpc`."""
        return self._rpc.answer(op, args)

    def _close_round(self, round_id: str) -> None:
        """Stop a round's live members; their final outputs go out with the next step."""
        for request_id in self._book.close(round_id):
            member = self._drop_cut(request_id)
            super().finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
            self._answer(member.request, FinishReason.ABORT, CUT_STOP_REASON, member)
        self._trees.settle()


def _say_what_stopped(member: Member, output: EngineCoreOutput, hit: Hit) -> None:
    """Take back what a member has beyond its end, and give the reason, if the front end does not find that itself."""
    keep_first(member.request, output, hit.num_tokens)
    if hit.text is None:
        output.finish_reason, output.stop_reason = FinishReason.STOP, BOXED_STOP_REASON
    elif hit.text in member.stop:
        output.finish_reason, output.stop_reason = FinishReason.STOP, hit.text


class RolloutScheduler(RolloutMixin, Scheduler):
    """`scheduler_cls` for synchronous scheduling."""


class RolloutAsyncScheduler(RolloutMixin, AsyncScheduler):
    """`scheduler_cls` for asynchronous scheduling, vLLM's default on GPUs."""


def make_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> RolloutScheduler | RolloutAsyncScheduler:
    """The `scheduler_cls` to name in vLLM's options: the class that fits the configuration vLLM settled on.

    vLLM decides late whether scheduling is asynchronous, and only calls what the name stands for.
    """
    is_async = vllm_config.scheduler_config.async_scheduling
    return (RolloutAsyncScheduler if is_async else RolloutScheduler)(vllm_config=vllm_config, **kwargs)
