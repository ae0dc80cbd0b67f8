"""The text of a trajectory that was sampled in several requests.

The front end detokenizes each request by itself: a character or a stop string that lies across two of them is in
neither. So the text is made again from all tokens, by vLLM's incremental detokenizer, as if it had been one request.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec

from longtail.engine.trajectory import Trajectory
from longtail.engine.vllm_args import sampling_params

if TYPE_CHECKING:
    from longtail.engine.rounds import MemberPlan


def with_whole_text(tokenizer: Any, plan: MemberPlan, last: Trajectory) -> Trajectory:
    """The last part of a trajectory, which ended by itself, with the text of all parts, if there is a tokenizer."""
    if tokenizer is None or not plan.has_late_text:
        return last
    token_ids = (plan.prior.output_token_ids if plan.prior else []) + last.output_token_ids
    is_at_end_token = last.finish_reason == "stop" and not isinstance(last.stop_reason, str)
    text = _whole_text(tokenizer, plan, token_ids, sampling_params(plan), is_at_end_token=is_at_end_token)
    return msgspec.structs.replace(last, text=text or None)


def _whole_text(
    tokenizer: Any, plan: MemberPlan, output_token_ids: list[int], params: Any, *, is_at_end_token: bool
) -> str:
    """Detokenize `output_token_ids`, all that a trajectory has; `params` are vLLM's for its last request."""
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    whole = params.clone()
    whole.detokenize, whole.stop = True, list(plan.sampling.stop)
    whole.min_tokens = max(params.min_tokens, plan.metadata.num_prior_tokens)
    source: Any = SimpleNamespace(
        request_id=plan.request_id, prompt_token_ids=plan.prompt.token_ids, sampling_params=whole
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, source)
    # An end token has no text, a stop string is found in the text: vLLM tells the detokenizer of the first only.
    for position, token_id in enumerate(output_token_ids, start=1):
        if detokenizer.update([token_id], is_at_end_token and position == len(output_token_ids)) is not None:
            break
    return detokenizer.get_next_output_text(True, False)
