"""What rounds do to vLLM's own requests and outputs: checks, tokens that they had before, and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput

from longtail.scheduler.errors import InvalidInputError
from longtail.scheduler.forking import cannot_fork
from longtail.scheduler.metadata import EXTRA_ARGS_KEY, MemberReport, RolloutMetadata

if TYPE_CHECKING:
    from vllm.v1.request import Request


def check_request(metadata: RolloutMetadata, request: Request, kv_refusal: str | None) -> None:
    """What only the request itself can say of its metadata.

    Raises:
        InvalidInputError: names the field.

    """
    for name, instead in (("can_fork", "false"), ("tree", "nothing")):
        if (value := getattr(metadata, name)) and (refusal := kv_refusal or cannot_fork(request)) is not None:
            raise InvalidInputError(f"{EXTRA_ARGS_KEY}.{name}", f"{instead}, because of {refusal}", value)
    if request.resumable:
        raise InvalidInputError(EXTRA_ARGS_KEY, "a request whose prompt is there at once", "streaming input")
    if metadata.num_prior_tokens and request.prompt_embeds is not None:
        raise InvalidInputError(f"{EXTRA_ARGS_KEY}.num_prior_tokens", "0, because the prompt has embeddings", metadata)
    for name, bound in (
        ("num_prior_tokens", request.num_prompt_tokens - 1),
        ("num_computed_tokens", request.num_prompt_tokens),
    ):
        if getattr(metadata, name) > bound:
            raise InvalidInputError(f"{EXTRA_ARGS_KEY}.{name}", f"at most {bound}, for its prompt", metadata)
    if metadata.num_prior_tokens >= request.max_tokens:
        what = f"more than the {metadata.num_prior_tokens} prior tokens, which it counts too"
        raise InvalidInputError("max_tokens", what, request.max_tokens)


def restore(request: Request, num_prior: int) -> None:
    """Make the last tokens of a prompt output again.

    vLLM then counts budgets, stops, penalties and repetitions as if the trajectory had never been stopped, as it does
    for a request that it preempted.
    """
    if not num_prior:
        return
    assert request.prompt_token_ids is not None
    request._output_token_ids.extend(request.prompt_token_ids[-num_prior:])
    request.prompt_token_ids = request.prompt_token_ids[:-num_prior]
    request.num_prompt_tokens -= num_prior
    # Of a prompt that is prefilled for the first time: this has been, and may have KV beyond it.
    request.prefill_stats = None


def inherit(request: Request, metadata: RolloutMetadata, token_ids: list[int]) -> None:
    """Give a request that was never scheduled its first output tokens, which another one has sampled."""
    if not token_ids:
        return
    request.append_output_token_ids(token_ids)
    request.prefill_stats = None
    tell_worker(request, msgspec.structs.replace(metadata, num_prior_tokens=len(token_ids), num_drawn_tokens=0))


def tell_worker(request: Request, metadata: RolloutMetadata) -> None:
    """Put into a request what the workers have to know of its metadata; of its tree that is nothing."""
    assert request.sampling_params is not None
    params = request.sampling_params.clone()
    slim = msgspec.to_builtins(msgspec.structs.replace(metadata, tree=None))
    params.extra_args = {**(params.extra_args or {}), EXTRA_ARGS_KEY: slim}
    request.sampling_params = params


def keep_first(request: Request, output: EngineCoreOutput, count: int) -> None:
    """Take back all but the first `count` tokens that a step gave a request."""
    if num_over := len(output.new_token_ids) - count:
        del request._output_token_ids[-num_over:], request._all_token_ids[-num_over:]
        del output.new_token_ids[count:]
        if output.new_logprobs is not None:
            output.new_logprobs = output.new_logprobs.slice_request(0, count)


def attach_report(output: EngineCoreOutput, report: MemberReport) -> None:
    """Let a final output carry a member's report."""
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), EXTRA_ARGS_KEY: msgspec.to_builtins(report)}


def empty_output(request: Request, now: float) -> EngineCoreOutput:
    """An output without tokens for a request that this step did not run.

    vLLM's latency histograms subtract the times of a finished request's events; one that was never scheduled gets
    its SCHEDULED event here, or they would be fed minus the uptime of the machine.
    """
    events = request.take_events() or []
    if events and not request.num_computed_tokens and not request.num_preemptions:
        events.append(EngineCoreEvent.new_event(EngineCoreEventType.SCHEDULED, now))
    return EngineCoreOutput(request.request_id, [], events=events or None, trace_headers=request.trace_headers)
