"""Speculation on a CPU rejects a padded draft, and draws what replaces it from the target distribution.

The scheduler pads drafts with -1: for a request that enters with one token to compute, and for drafts that a grammar
refused. Stock C++ takes -1 for an index: it reads the probability before the row's first, may accept the padding,
and the token is lost from the output. With draft probabilities it moreover draws the replacement from
`(target - draft)+`, which is right only where a draft drawn from `draft` was rejected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longtail.engine.patches.entry import Change, Entry, Source

if TYPE_CHECKING:
    from torch import Tensor

#: Above every acceptance ratio that `_without_padding` leaves possible (1, target over a draft probability of 1).
_NEVER_ACCEPT = 2.0


def _without_padding(draft_probs: Tensor | None, is_padding: Tensor) -> Tensor | None:
    """Draft probabilities with a zero row for each padded draft."""
    return None if draft_probs is None else draft_probs.masked_fill(is_padding.unsqueeze(-1), 0.0)


def _make_random_sample(stock: Any, owner: Any) -> Any:
    def _rejection_random_sample_kernel_impl(
        output_token_ids: Tensor,
        cu_num_draft_tokens: Tensor,
        draft_token_ids: Tensor,
        draft_probs: Tensor | None,
        target_probs: Tensor,
        bonus_token_ids: Tensor,
        recovered_token_ids: Tensor,
        uniform_probs: Tensor,
        is_greedy: Tensor,
        max_spec_len: int,
        vocab_size: int,
        synthetic_conditional_rates: Tensor | None = None,
        NO_DRAFT_PROBS: bool = False,
        SYNTHETIC_MODE: bool = False,
    ) -> None:
        is_padding = draft_token_ids < 0
        if is_padding.any():
            draft_token_ids = draft_token_ids.clamp(min=0)
            draft_probs = _without_padding(draft_probs, is_padding)
            uniform_probs = uniform_probs.masked_fill(is_padding, _NEVER_ACCEPT)
        stock(
            output_token_ids,
            cu_num_draft_tokens,
            draft_token_ids,
            draft_probs,
            target_probs,
            bonus_token_ids,
            recovered_token_ids,
            uniform_probs,
            is_greedy,
            max_spec_len,
            vocab_size,
            synthetic_conditional_rates,
            NO_DRAFT_PROBS,
            SYNTHETIC_MODE,
        )

    return _rejection_random_sample_kernel_impl


def _make_recovered_tokens(stock: Any, owner: Any) -> Any:
    def _sample_recovered_tokens_kernel_impl(
        output_token_ids: Tensor,
        cu_num_draft_tokens: Tensor,
        draft_token_ids: Tensor,
        draft_probs: Tensor | None,
        target_probs: Tensor,
        inv_q: Tensor,
        vocab_size: int,
        BLOCK_SIZE: int | None = None,
        NO_DRAFT_PROBS: bool = False,
        USE_FP64_GUMBEL: bool = False,
    ) -> None:
        if draft_probs is not None and (is_padding := draft_token_ids < 0).any():
            draft_probs = _without_padding(draft_probs, is_padding)
        stock(
            output_token_ids,
            cu_num_draft_tokens,
            draft_token_ids,
            draft_probs,
            target_probs,
            inv_q,
            vocab_size,
            BLOCK_SIZE,
            NO_DRAFT_PROBS,
            USE_FP64_GUMBEL,
        )

    return _sample_recovered_tokens_kernel_impl


ENTRY = Entry(
    name="cpu-padded-drafts",
    what="A draft id of -1 is rejected, and the token in its place is drawn from the target distribution.",
    why="Padding is accepted now and then, and the sampled token is lost.",
    upstream=("vllm-project/vllm#46533 (the same for Triton)",),
    versions=("0.32.0",),
    where="cpu",
    changes=(
        Change(
            "vllm.utils.cpu_triton_utils",
            "_rejection_random_sample_kernel_impl",
            _make_random_sample,
            "07b8705b119dc62b",
        ),
        Change(
            "vllm.utils.cpu_triton_utils",
            "_sample_recovered_tokens_kernel_impl",
            _make_recovered_tokens,
            "c7681d3dfbd81857",
        ),
    ),
    relies_on=(
        Source("vllm.v1.sample.rejection_sampler", "rejection_sample", "3910c029508423e3"),
        Source("vllm.v1.sample.rejection_sampler", "sample_recovered_tokens", "ef487be7426bfeee"),
    ),
)
