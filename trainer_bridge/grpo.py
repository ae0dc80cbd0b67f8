"""GRPO for rollouts that are not on-policy: the estimators, in the order in which a step uses them.

Per-token tensors have the shape of the padded token ids, [N, L]: N trajectories, prompt and output, and column t speaks
of token t, which the model predicts at t - 1. They are 0 where a token is not trained. Three policies meet in a token:

    behaviour  the one that sampled it: `Trajectory.logprobs`. With partial rollouts, one of several weight versions;
    old        the centre of the clip: see `GrpoConfig.old`;
    new        the one that is differentiated.

With A the advantage, r = new / old and w = old / behaviour, cut off at `weight_cap` and without gradient:

    loss = - sum over tokens of c * w * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

where `c` averages (`loss_coefficients`). What is not cut off or clipped has a known expectation, which the tests
enumerate: with `weight_level="sequence"`, `divide_by_std=False` and `aggregate="fixed"`, the gradient of the expected
reward over the fixed divisor times (G - 1) / G, since the mean of the G rewards contains the trajectory's own.

No sampling, models or optimizer here. `grpo_batch.py` makes the tensors, `grpo_trainer.py` has the step.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longtail.trainer_bridge.grpo_batch import Batch, build_batch, group_advantages
from longtail.trainer_bridge.grpo_config import GrpoConfig
from longtail.trainer_bridge.prefix_packing import Packing, packed_logits

__all__ = [
    "Batch",
    "GrpoConfig",
    "LossSums",
    "build_batch",
    "group_advantages",
    "grpo_loss",
    "importance_weights",
    "k3",
    "kl_penalty",
    "loss_coefficients",
    "policy_ratio",
    "token_logprobs",
]

#: Logarithms of ratios are cut off here, so that no product with them is infinite in float32.
MAX_LOG_RATIO = 20.0


def token_logprobs(model: nn.Module, batch: Batch, config: GrpoConfig, packing: Packing | None = None) -> Tensor:
    """Log-probabilities of the trained tokens at the sampling temperature, float32 or wider [N, L]; 0 elsewhere.

    With the `packing` of the batch's rows each token that they share is forwarded once, see `prefix_packing`.

    `model` is causal, takes token ids [N, L] (and `attention_mask`, `position_ids` and `use_cache`, if its `forward`
    has them) and returns logits [N, L, vocabulary] or something that has them as `.logits`.
    """
    if packing is not None:
        return _packed_logprobs(model, batch, config, packing)
    accepted = inspect.signature(model.forward).parameters
    position_ids = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    offered = {"attention_mask": batch.attention_mask, "position_ids": position_ids, "use_cache": False}
    output = model(batch.token_ids, **{name: value for name, value in offered.items() if name in accepted})
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    trained = batch.mask[:, 1:]
    # [tokens, vocabulary]: nothing is computed, or flows back, for the others
    logprobs = _chosen(logits[:, :-1][trained], batch.token_ids[:, 1:][trained], config)
    return logprobs.new_zeros(batch.mask.shape).masked_scatter(batch.mask, logprobs)


def _packed_logprobs(model: nn.Module, batch: Batch, config: GrpoConfig, packing: Packing) -> Tensor:
    logits = packed_logits(model, packing)
    places, row_tokens = torch.unique(packing.place[batch.mask], return_inverse=True)
    # A token has one place before it, in whatever rows it is.
    before = torch.empty_like(places).scatter_(0, row_tokens, packing.place.roll(1, 1)[batch.mask])
    logprobs = _chosen(logits[before], packing.token_ids.flatten()[places], config)[row_tokens]
    return logprobs.new_zeros(batch.mask.shape).masked_scatter(batch.mask, logprobs)


def _chosen(logits: Tensor, token_ids: Tensor, config: GrpoConfig) -> Tensor:
    """Log-probabilities of tokens [n] from logits [n, vocabulary]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / config.sampling.temperature
    return logits.gather(1, token_ids.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)


def importance_weights(old: Tensor, behaviour: Tensor, mask: Tensor, config: GrpoConfig) -> Tensor:
    """old / behaviour per token or trajectory before it is cut off at `weight_cap`, [N, L]; 1 at tokens not trained."""
    log_ratio = (old - behaviour) * mask
    if config.weight_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) * mask
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def policy_ratio(new: Tensor, old: Tensor, mask: Tensor, config: GrpoConfig) -> Tensor:
    """new / old per token, or its geometric mean over the trajectory (GSPO), [N, L]; 1 at tokens not trained."""
    log_ratio = (new - old) * mask
    if config.ratio == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1) * mask
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def k3(logprobs: Tensor, other: Tensor) -> Tensor:
    """Estimate of KL(policy of `logprobs` || other) from tokens of the former, never below 0 (Schulman 2020)."""
    difference = (other - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.expm1() - difference


def kl_penalty(new: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """`k3` times new / old per token, whose gradient is that of KL(new || reference) (DeepSeek-V3.2, arXiv 2512.02556).

    Without the ratio, the gradient of `k3` is that of KL(reference || new), and only on-policy.
    """
    return (new - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * k3(new, reference)


def loss_coefficients(mask: Tensor, config: GrpoConfig) -> Tensor:
    """What each trained token's loss counts, by trajectory, float64 [N]; 0 where nothing is trained.

    Computed over the whole batch and then taken by rows, it makes the losses of micro-batches add up to the batch's.
    """
    num_tokens = mask.sum(1).double()
    has_any = (num_tokens > 0).double()
    if config.aggregate == "token_mean":
        return has_any / num_tokens.sum().clamp(min=1)
    if config.aggregate == "sequence_mean":
        return has_any / (num_tokens.clamp(min=1) * has_any.sum().clamp(min=1))
    return has_any / (len(mask) * (config.fixed_divisor or config.sampling.max_tokens))


class LossSums(NamedTuple):
    """Sums over trained tokens, and maxima; float64 scalars.

    Attributes:
        tokens: their number.
        ratio, ratio_max: new / old.
        clipped_low, clipped_high: tokens without gradient, because the ratio is beyond the bound that it moves away to.
        weight, truncated: importance weights as used, and how many were cut off.
        lag, lag_squared, lag_max: new / behaviour per token, whatever `old` is.
        lag_kl: estimate of KL(behaviour || new).
        reference_kl: estimate of KL(new || reference), per token sampled by the behaviour policy; 0 without reference.

    """

    tokens: Tensor
    ratio: Tensor
    ratio_max: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    weight: Tensor
    truncated: Tensor
    lag: Tensor
    lag_squared: Tensor
    lag_max: Tensor
    lag_kl: Tensor
    reference_kl: Tensor

    def plus(self, other: LossSums) -> LossSums:
        """Of both together."""
        pairs = zip(self._fields, self, other, strict=True)
        return LossSums(*(torch.maximum(a, b) if name.endswith("_max") else a + b for name, a, b in pairs))


def grpo_loss(new: Tensor, batch: Batch, coefficients: Tensor, config: GrpoConfig) -> tuple[Tensor, LossSums]:
    """The loss, to be minimised, a scalar; see the module.

    Args:
        new: float [N, L] from `token_logprobs`, with gradient.
        batch: with `reference` if `kl_coef` is above 0. Without `old`, the weights of now are those that the step
            began with, so that r = 1 and nothing is clipped.
        coefficients: [N] from `loss_coefficients`.
        config: the estimator.

    """
    mask, now = batch.mask, new.detach()
    behaviour, advantages = batch.behaviour.to(new.dtype), batch.advantages.to(new.dtype).unsqueeze(1)
    began_with = now if batch.old is None else batch.old
    old = behaviour if config.old == "behaviour" else began_with

    exact = importance_weights(old, behaviour, mask, config)
    weights = torch.ones_like(exact) if config.weight_cap is None else exact.clamp(max=config.weight_cap)
    ratio = policy_ratio(new, old, mask, config)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    losses = -weights * torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if config.kl_coef:
        assert batch.reference is not None
        losses = losses + config.kl_coef * weights * kl_penalty(new, old, batch.reference)
    loss = (losses * mask * coefficients.to(new.dtype).unsqueeze(1)).sum()

    def total(values: Tensor) -> Tensor:
        return values.detach()[mask].double().sum()

    def largest(values: Tensor) -> Tensor:
        return torch.where(mask, values.detach(), 0.0).max().double()

    lag = ((now - behaviour) * mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    sums = LossSums(
        tokens=total(mask),
        ratio=total(ratio),
        ratio_max=largest(ratio),
        clipped_low=total((ratio < low) & (advantages < 0)),
        clipped_high=total((ratio > high) & (advantages > 0)),
        weight=total(weights),
        truncated=total(weights < exact),
        lag=total(lag),
        lag_squared=total(lag.square()),
        lag_max=largest(lag),
        lag_kl=total(k3(behaviour, now)),
        reference_kl=total(torch.zeros_like(now) if batch.reference is None else k3(now, batch.reference)),
    )
    return loss, sums
