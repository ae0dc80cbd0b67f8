"""Speculation on a CPU verifies drafts with each request's own temperature, top-k and top-p.

Stock `_expand_kernel_impl`, which repeats a request's parameter for each of its draft tokens, gives the C++ kernel an
int64 copy of its output and drops the copy. Every real parameter is float32 or int32, so that draft tokens are
verified under whatever the uninitialised output held: sampled output comes from a wrong distribution, without an
error. Greedy batches are not affected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longtail.engine.patches.entry import Change, Entry, Source

if TYPE_CHECKING:
    from torch import Tensor


def _make_expand(stock: Any, owner: Any) -> Any:
    import torch

    def _expand_kernel_impl(
        output: Tensor,
        input_val: Tensor,
        cu_num_tokens: Tensor,
        replace_from: int,
        replace_to: int,
        MAX_NUM_TOKENS: int | None = None,
    ) -> None:
        values = input_val.masked_fill(input_val == replace_from, replace_to)
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        output.copy_(values.repeat_interleave(counts))

    return _expand_kernel_impl


ENTRY = Entry(
    name="cpu-expand",
    what="The CPU's expand kernel writes its output for every dtype.",
    why="Sampled tokens of speculative decoding come from a wrong distribution.",
    upstream=("vllm-project/vllm#55005",),
    versions=("0.32.0",),
    where="cpu",
    changes=(Change("vllm.utils.cpu_triton_utils", "_expand_kernel_impl", _make_expand, "cb72d4d389c5be6d"),),
    relies_on=(Source("vllm.v1.sample.rejection_sampler", "expand_batch_to_tokens", "8fcf791699dae7a4"),),
)
