"""A seeded trajectory that goes on in a new request samples what it would have sampled in the old one.

vLLM seeds a generator when a request begins and draws from it once a token. A resumed request begins in the middle of
its trajectory, so its generator is moved on by the draws of the tokens before: by drawing the same again, which needs
nothing to be stored and is right wherever the tokens came from. On a GPU that is one small kernel a token. Only vLLM's
V1 runner needs it: V2 draws by position.
"""

from __future__ import annotations

from typing import Any

from longtail.engine.patches.entry import Change, Entry, Source
from longtail.scheduler.metadata import metadata_of

_RUNNER = "vllm.v1.worker.gpu_model_runner"


def skip_draws(generator: Any, num_tokens: int, sampler: Any, vocab_size: int) -> None:
    """Draw from `generator` what sampling `num_tokens` tokens draws."""
    import torch

    by_seed = generator.device.type == "cpu" and not sampler.use_fp64_gumbel
    if by_seed:
        torch.randint(0, 2**31, (num_tokens,), generator=generator, dtype=torch.long)
        return
    dtype = torch.float64 if sampler.use_fp64_gumbel else torch.float32
    noise = torch.empty(vocab_size, dtype=dtype, device=generator.device)
    for _ in range(num_tokens):
        noise.exponential_(generator=generator)


def _make_update_states(stock: Any, owner: type) -> Any:
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        result = stock(self, scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            generator = self.requests[new.req_id].generator
            metadata = None if generator is None else metadata_of(new.sampling_params.extra_args)
            if metadata is not None and metadata.num_draws:
                sampler = self.sampler.topk_topp_sampler
                skip_draws(generator, metadata.num_draws, sampler, self.input_batch.vocab_size)
        return result

    return _update_states


ENTRY = Entry(
    name="resumed-seeds",
    what="A resumed member's generator has drawn for the tokens that the trajectory has.",
    why="A seeded trajectory would draw the numbers of its beginning again after every resume.",
    upstream=(),
    versions=("0.32.0",),
    where="everywhere",
    changes=(Change(_RUNNER, "GPUModelRunner._update_states", _make_update_states, "30f2118a61616d93"),),
    relies_on=(
        Source("vllm.v1.sample.ops.topk_topp_sampler", "TopKTopPSampler.forward_cpu", "f8dc272b56372000"),
        Source("vllm.v1.sample.ops.topk_topp_sampler", "random_sample", "2dd0def153512a31"),
    ),
)
