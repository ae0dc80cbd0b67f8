"""To the V1 runner, the prior tokens of a request that goes on are output, not prompt.

A resumed member, or a branch, is a new request to the runner, which takes all of its tokens for a prompt. Penalties,
`min_tokens` and logits processors then see a history that begins in the middle. The scheduler gives the runner all
tokens and this cuts them, where the runner makes its state of them. The V2 runner is told which tokens are prompt.
"""

from __future__ import annotations

from typing import Any

from longtail.engine.patches.entry import Change, Entry, Source
from longtail.scheduler.metadata import metadata_of

_BATCH = "vllm.v1.worker.gpu_input_batch"
_RUNNER = "vllm.v1.worker.gpu_model_runner"


def _make_post_init(stock: Any, owner: type) -> Any:
    def __post_init__(self: Any) -> None:
        params = self.sampling_params
        metadata = None if params is None else metadata_of(params.extra_args)
        if metadata is not None and metadata.num_prior_tokens and not self.output_token_ids:
            self.output_token_ids = self.prompt_token_ids[-metadata.num_prior_tokens :]
            self.prompt_token_ids = self.prompt_token_ids[: -metadata.num_prior_tokens]
        stock(self)

    return __post_init__


ENTRY = Entry(
    name="prior-output",
    what="The V1 runner takes the prior tokens of a member that goes on for output.",
    why="Penalties, `min_tokens` and logits processors would not see what was sampled before.",
    upstream=(),
    versions=("0.32.0",),
    where="everywhere",
    changes=(Change(_BATCH, "CachedRequestState.__post_init__", _make_post_init, "094634b51b193dea"),),
    relies_on=(
        Source(_RUNNER, "GPUModelRunner._update_states", "30f2118a61616d93"),
        Source("vllm.v1.core.sched.output", "NewRequestData.from_request", "296f054ec84b20ed"),
        Source("vllm.v1.core.sched.scheduler", "Scheduler._make_cached_request_data", "f4e14e56964c612b"),
        Source("vllm.v1.request", "Request", "6d8b5d6f85ab7af8"),
    ),
)
