"""The two CPU sampling kernels of the ledger against exact laws, with vLLM's own kernels as negative controls.

Each chi-square test has a false-alarm rate of 1e-6 over its seeds, which are fixed; a control passes when the stock
kernel's p-value is below that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from longtail.engine.patches import ledger

FALSE_ALARM = 1e-6
VOCAB = 32
LOST = VOCAB  # column of samples whose first token is missing from the output
NUM_REQUESTS = 20_000
KERNELS = "vllm.utils.cpu_triton_utils"


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    ledger.apply()
    import vllm._custom_ops  # noqa: F401  loads the C++ operators
    from vllm.utils import cpu_triton_utils

    return cpu_triton_utils


def stock(name: str) -> Callable[..., None]:
    return ledger.stock(f"{KERNELS}.{name}")


@dataclass
class Sampler:
    """The steps of vLLM's `rejection_sample` for requests with one draft each, from kernels that can be swapped."""

    expand: Callable[..., None]
    random: Callable[..., None]
    recovered: Callable[..., None]

    @classmethod
    def of(cls, kernels: ModuleType, **swapped: Callable[..., None]) -> Sampler:
        names = {
            "expand": "_expand_kernel_impl",
            "random": "_rejection_random_sample_kernel_impl",
            "recovered": "_sample_recovered_tokens_kernel_impl",
        }
        return cls(**{part: swapped.get(part, getattr(kernels, name)) for part, name in names.items()})

    def first_token_counts(
        self,
        logits: torch.Tensor,
        temperature: float,
        drafts: torch.Tensor,
        draft_probs: torch.Tensor | None,
    ) -> torch.Tensor:
        """How often each token, or none (column `LOST`), came out first."""
        n = len(drafts)
        generator = torch.Generator().manual_seed(0)
        cumulative = torch.arange(1, n + 1, dtype=torch.int32)
        expanded = torch.full((n,), 7.0)  # stands for the uninitialised memory of the caller
        self.expand(expanded, torch.full((n,), temperature), cumulative, 0, 1)
        # One row more in front: stock reads the probability before the first for a draft id of -1.
        target = (logits / torch.cat([expanded[:1], expanded]).unsqueeze(-1)).softmax(-1)[1:]
        inv_q = torch.empty(n, VOCAB).exponential_(generator=generator).reciprocal()
        recovered = torch.empty_like(drafts)
        no_probs = draft_probs is None
        self.recovered(recovered, cumulative, drafts, draft_probs, target, inv_q, VOCAB, NO_DRAFT_PROBS=no_probs)
        output = torch.full((n, 2), -1, dtype=torch.int32)
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        bonus = torch.zeros(n, 1, dtype=torch.int64)
        greedy = torch.zeros(n, dtype=torch.bool)
        self.random(
            output, cumulative, drafts, draft_probs, target, bonus, recovered, uniform, greedy, 1, VOCAB,
            NO_DRAFT_PROBS=no_probs,
        )  # fmt: skip
        return torch.bincount(torch.where(output[:, 0] < 0, LOST, output[:, 0]), minlength=VOCAB + 1)


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2


def law(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.cat([(logits.double() / temperature).softmax(-1), torch.zeros(1)])


def draft_law(logits: torch.Tensor) -> torch.Tensor:
    return (logits.roll(1) * 0.7).softmax(-1)


def draw_drafts(probs: torch.Tensor, share_padded: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    drafts = torch.multinomial(probs, NUM_REQUESTS, replacement=True, generator=generator).to(torch.int32)
    padded = torch.rand(NUM_REQUESTS, generator=generator) < share_padded
    return drafts.masked_fill(padded, -1)


# ---- expand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_expand_repeats_each_value_for_its_tokens(kernels: ModuleType, dtype: torch.dtype) -> None:
    values = torch.tensor([0.7, 0.0, 1.3, 2.5], dtype=dtype)
    output = torch.full((6,), 99, dtype=dtype)
    kernels._expand_kernel_impl(output, values, torch.tensor([2, 3, 3, 6], dtype=torch.int32), 0, 1)
    v = [x if x != 0 else 1 for x in values.tolist()]
    assert output.tolist() == [v[0], v[0], v[1], v[3], v[3], v[3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_stock_expand_writes_nothing(kernels: ModuleType, dtype: torch.dtype) -> None:
    output = torch.full((2,), 99, dtype=dtype)
    stock("_expand_kernel_impl")(output, torch.tensor([3, 4], dtype=dtype), torch.tensor([1, 2]), 0, 1)
    assert output.tolist() == [99, 99]


@pytest.mark.parametrize("with_draft_probs", [False, True])
def test_drafts_are_verified_at_the_request_s_temperature(
    kernels: ModuleType,
    logits: torch.Tensor,
    chi_square_p: Callable[..., float],
    with_draft_probs: bool,
) -> None:
    drafts = draw_drafts(draft_law(logits), share_padded=0.0)
    draft_probs = draft_law(logits).repeat(NUM_REQUESTS, 1) if with_draft_probs else None

    def p_value(sampler: Sampler) -> float:
        return chi_square_p(sampler.first_token_counts(logits, 0.7, drafts, draft_probs), law(logits, 0.7))

    assert p_value(Sampler.of(kernels)) > FALSE_ALARM
    assert p_value(Sampler.of(kernels, expand=stock("_expand_kernel_impl"))) < FALSE_ALARM


# ---- padded drafts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_draft_probs", [False, True])
def test_padded_drafts_leave_the_law_alone(
    kernels: ModuleType,
    logits: torch.Tensor,
    chi_square_p: Callable[..., float],
    with_draft_probs: bool,
) -> None:
    drafts = draw_drafts(draft_law(logits), share_padded=0.5)
    draft_probs = draft_law(logits).repeat(NUM_REQUESTS, 1) if with_draft_probs else None

    def p_value(sampler: Sampler) -> float:
        return chi_square_p(sampler.first_token_counts(logits, 0.7, drafts, draft_probs), law(logits, 0.7))

    assert p_value(Sampler.of(kernels)) > FALSE_ALARM
    assert p_value(Sampler.of(kernels, random=stock("_rejection_random_sample_kernel_impl"))) < FALSE_ALARM
    if with_draft_probs:
        assert p_value(Sampler.of(kernels, recovered=stock("_sample_recovered_tokens_kernel_impl"))) < FALSE_ALARM


def test_no_padded_draft_is_accepted_however_unlikely_its_stand_in(kernels: ModuleType) -> None:
    n = 64
    target = torch.zeros(n, VOCAB)
    target[:, 0] = 1.0
    draft_probs = torch.full((n, VOCAB), 1.0)
    draft_probs[:, 0] = 1e-30
    for probs in (None, draft_probs):
        output = torch.full((n, 2), -1, dtype=torch.int32)
        kernels._rejection_random_sample_kernel_impl(
            output, torch.arange(1, n + 1), torch.full((n,), -1), probs, target, torch.full((n, 1), 9),
            torch.full((n,), 5), torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.bool), 1, VOCAB,
            NO_DRAFT_PROBS=probs is None,
        )  # fmt: skip
        assert output.tolist() == [[5, -1]] * n


@pytest.mark.parametrize("with_draft_probs", [False, True])
def test_real_drafts_are_sampled_bit_for_bit_as_by_stock(
    kernels: ModuleType, logits: torch.Tensor, with_draft_probs: bool
) -> None:
    drafts = draw_drafts(draft_law(logits), share_padded=0.0)
    draft_probs = draft_law(logits).repeat(NUM_REQUESTS, 1) if with_draft_probs else None
    ours = Sampler.of(kernels)
    stocks = Sampler.of(
        kernels,
        random=stock("_rejection_random_sample_kernel_impl"),
        recovered=stock("_sample_recovered_tokens_kernel_impl"),
    )
    counts = [sampler.first_token_counts(logits, 0.7, drafts, draft_probs) for sampler in (ours, stocks)]
    assert torch.equal(*counts)
