"""What a step of the reference trainer did."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec
import torch

from longtail.engine.trajectory import Group
from longtail.trainer_bridge.grpo import LossSums
from longtail.trainer_bridge.grpo_batch import Batch


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """One step. Means are over the trained tokens of all its updates, so a token counts once per epoch.

    Attributes:
        version: of the weights that the step began with.
        num_updates: 0 if no token could be trained.
        num_trajectories: all that were given. `num_model_tokens` are the tokens that the model sampled in them,
            `num_trained_tokens` those that are not masked, `masked_share` the share of the others.
        staleness: tokens that the model sampled, by age in versions.
        mean_reward, mean_length: over trajectories; the length is in output tokens.
        zero_advantage_share: trajectories whose group has equal rewards, and that teach nothing.
        loss, grad_norm, learning_rate: of the last update; the norm is the one before it was cut.
        mean_ratio, max_ratio: new / old.
        clip_share_low, clip_share_high: tokens whose gradient the clip took away.
        mean_weight, truncated_share: importance weights as they were used, and the share that was cut off.
        mean_lag, max_lag: new / behaviour, the ratio that all correction is about.
        ess: effective sample size of the lag (Kish), as a share of the tokens: 1 on-policy.
        lag_kl: estimate of KL(behaviour || new) in nats per token.
        reference_kl: estimate of KL(new || reference) in nats per token, 0 without a reference.
        saved_share: tokens of the trajectories that the model was not given in the updates, because another trajectory
            of their micro-batch has the same prefix; 0 without `TrainerConfig.share_prefixes`.
        seconds: wall time.

    """

    version: int
    num_updates: int
    num_trajectories: int
    num_model_tokens: int
    num_trained_tokens: int
    masked_share: float
    staleness: dict[int, int]
    mean_reward: float
    mean_length: float
    zero_advantage_share: float
    loss: float
    grad_norm: float
    learning_rate: float
    mean_ratio: float
    max_ratio: float
    clip_share_low: float
    clip_share_high: float
    mean_weight: float
    truncated_share: float
    mean_lag: float
    max_lag: float
    ess: float
    lag_kl: float
    reference_kl: float
    saved_share: float
    seconds: float


def step_stats(
    groups: Sequence[Group],
    batch: Batch,
    sums: LossSums | None,
    *,
    version: int,
    num_updates: int,
    loss: float,
    grad_norm: float,
    learning_rate: float,
    saved_share: float,
    seconds: float,
) -> StepStats:
    """Of the groups, the tensors made of them, and the sums over all updates (`None` without any)."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    staleness = Counter(batch.staleness[batch.staleness >= 0].tolist())
    num_trained = int(batch.mask.sum())
    if sums is None:
        sums = LossSums(*(torch.zeros(()) for _ in LossSums._fields))
    total = LossSums(*torch.stack(list(sums)).double().cpu())
    tokens = total.tokens.clamp(min=1.0)

    def mean(value: torch.Tensor) -> float:
        return (value / tokens).item()

    return StepStats(
        version=version,
        num_updates=num_updates,
        num_trajectories=len(trajectories),
        num_model_tokens=staleness.total(),
        num_trained_tokens=num_trained,
        masked_share=1 - num_trained / max(1, staleness.total()),
        staleness=dict(sorted(staleness.items())),
        mean_reward=math.fsum(t.reward or 0.0 for t in trajectories) / len(trajectories),
        mean_length=sum(len(t.output_token_ids) for t in trajectories) / len(trajectories),
        zero_advantage_share=(batch.advantages == 0).double().mean().item(),
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        mean_ratio=mean(total.ratio),
        max_ratio=total.ratio_max.item(),
        clip_share_low=mean(total.clipped_low),
        clip_share_high=mean(total.clipped_high),
        mean_weight=mean(total.weight),
        truncated_share=mean(total.truncated),
        mean_lag=mean(total.lag),
        max_lag=total.lag_max.item(),
        ess=mean(total.lag.square() / total.lag_squared.clamp(min=1e-300)),
        lag_kl=mean(total.lag_kl),
        reference_kl=mean(total.reference_kl),
        saved_share=saved_share,
        seconds=seconds,
    )
