"""vLLM's asyncio engine, which tells a client what the scheduler has against its rollout metadata.

Metadata that contradicts other members of its round (another target, a place that is taken) is known only in the
scheduler, which ends the request with the finish reason `error`. vLLM's routes answer that with a 500 and no reason.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from vllm.v1.engine.async_llm import AsyncLLM

from longtail.engine.errors import InvalidInputError
from longtail.engine.patches.request_check import request_error_class
from longtail.scheduler.metadata import EXTRA_ARGS_KEY

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams


class RolloutAsyncLLM(AsyncLLM):
    """Raises a refusal of the scheduler from `generate`, as the client error that it is."""

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        outputs = super().generate(prompt, sampling_params, request_id, **options)
        return _refusals_raised(outputs) if EXTRA_ARGS_KEY in (sampling_params.extra_args or {}) else outputs


async def _refusals_raised(outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[RequestOutput, None]:
    try:
        async for output in outputs:
            if output.finished:
                _raise_refusal(output)
            yield output
    finally:
        await outputs.aclose()


def _raise_refusal(output: RequestOutput) -> None:
    for completion in output.outputs:
        reason = completion.stop_reason
        if completion.finish_reason == "error" and isinstance(reason, str) and reason.startswith(f"{EXTRA_ARGS_KEY}."):
            field, _, problem = reason.partition(": expected ")
            expected, _, got = problem.rpartition(", got ")
            raise request_error_class()(InvalidInputError(field, expected, _AsShown(got)))


class _AsShown(str):
    """Text that is a `repr` already."""

    def __repr__(self) -> str:
        return str(self)
