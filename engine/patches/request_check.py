"""A request with malformed rollout metadata is refused in the front end, before it is enqueued.

vLLM's front end takes any `extra_args`; the scheduler would be the first to look at ours. The error is also one of
vLLM's own request errors: `AsyncLLM.generate` wraps every other exception in an `EngineGenerateError`, which is HTTP
status 500, while this one is 400 and names the field in `param`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from longtail.engine.errors import InvalidInputError
from longtail.engine.patches.entry import Change, Entry, Source


@cache
def request_error_class() -> Callable[[InvalidInputError], InvalidInputError]:
    """Our error for a wrong field that is vLLM's `VLLMValidationError` too."""
    from vllm.exceptions import VLLMValidationError

    class InvalidRequestError(InvalidInputError, VLLMValidationError):
        """A field of a request is wrong."""

        def __init__(self, error: InvalidInputError) -> None:
            ValueError.__init__(self, str(error))
            self.field, self.expected, self.got = error.field, error.expected, error.got
            self.parameter, self.value = error.field, None

        def __str__(self) -> str:
            return str(self.args[0])

    return InvalidRequestError


def _make_validate_params(stock: Any, owner: type) -> Any:
    from vllm.sampling_params import SamplingParams

    from longtail.scheduler.metadata import metadata_of

    def _validate_params(self: Any, params: Any, supported_tasks: tuple[str, ...]) -> bool | None:
        if isinstance(params, SamplingParams):
            try:
                metadata_of(params.extra_args)
            except InvalidInputError as error:
                raise request_error_class()(error) from error
        result: bool | None = stock(self, params, supported_tasks)
        return result

    return _validate_params


ENTRY = Entry(
    name="request-check",
    what="InputProcessor refuses malformed rollout metadata with a request error (HTTP 400) that names the field.",
    why="vLLM does not look into `extra_args`, and an error in the scheduler would be too late for a 4xx.",
    upstream=(),
    versions=("0.32.0",),
    where="everywhere",
    changes=(
        Change(
            "vllm.v1.engine.input_processor",
            "InputProcessor._validate_params",
            _make_validate_params,
            "c91ea5c91a9840bc",
        ),
    ),
    relies_on=(Source("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", "053f15ab95f19b1a"),),
)
