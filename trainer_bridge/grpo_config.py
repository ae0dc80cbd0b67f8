"""Which GRPO estimator, from what rollouts, and how its gradient is followed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from longtail.engine.config import SamplingConfig
from longtail.trainer_bridge.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """Which estimator. The defaults are for partial rollouts.

    Attributes:
        sampling: how the rollouts were sampled. Log-probabilities are taken at its temperature. Top-p, top-k and
            min_tokens must be off: they set probabilities to 0, so that a token that one version sampled can be
            impossible in another, and its ratio undefined.
        advantage: `group`: compared with the group's mean. `tree`: also with the mean of every subtree that the
            trajectory is in, for groups that branched (TreePO, arXiv 2508.17445; see `longtail.hooks.tree_advantages`).
        divide_by_std: the advantage is (reward - mean) / std of its group (GRPO, arXiv 2402.03300); without, reward -
            mean (Dr. GRPO, arXiv 2503.20783: the division favours groups that are nearly all right or all wrong).
        old: the weights that the clip is centred on. `step`: those that the step begins with (decoupled PPO: Hilton et
            al. 2021, arXiv 2110.00641; AReaL, arXiv 2505.24298). The clip then bounds how far a step goes, and the
            importance weight answers for the age of a token. With several updates per step this costs one more forward
            pass. `behaviour`: those that sampled the token; then the importance weight is 1 and the ratio itself
            corrects, up to the clip. A stale token may be beyond the clip before the first update, and then has no
            gradient: right for small lags, and where the forward pass matters.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high] (PPO, arXiv 1707.06347; unequal
            bounds that let rare tokens grow: DAPO, arXiv 2503.14476). `inf` clips nothing.
        weight_cap: importance weights are cut off here (truncated importance sampling: Ionides 2008; Yao et al. 2025,
            *Your Efficient RL Framework Secretly Brings You Off-Policy RL Training*). `inf` cuts nothing off: unbiased,
            of any variance. `None` does without weights: biased by all of the lag.
        weight_level: `token` weighs each token by itself: low variance, but it leaves the distribution of the prefixes
            as it was sampled, and of what follows. `sequence` weighs by the product over the trajectory's trained
            tokens, which is exact, with a variance that grows exponentially in the length.
        ratio: `token`, or `sequence`: the geometric mean over the trajectory's trained tokens (GSPO, arXiv 2507.18071).
            GSPO's bounds are smaller by orders: 3e-4 and 4e-4, with `aggregate="sequence_mean"`.
        aggregate: `token_mean`: over all trained tokens (DAPO). `sequence_mean`: over the tokens of a trajectory, then
            over trajectories that have any (GRPO), so that a token of a long one counts less. `fixed`: the sum over
            tokens divided by `fixed_divisor`, then the mean over all trajectories (Dr. GRPO).
        fixed_divisor: in tokens; `None` is `sampling.max_tokens`.
        kl_coef: weight of the KL divergence from a reference model, see `kl_penalty`; 0 needs none.
        max_staleness: tokens sampled under weights that are more versions away have no gradient; `None` takes all.

    Raises:
        InvalidInputError: a field is not what it should be.

    """

    sampling: SamplingConfig = SamplingConfig()
    advantage: Literal["group", "tree"] = "group"
    divide_by_std: bool = True
    old: Literal["step", "behaviour"] = "step"
    clip_low: float = 0.2
    clip_high: float = 0.28
    weight_cap: float | None = 2.0
    weight_level: Literal["token", "sequence"] = "token"
    ratio: Literal["token", "sequence"] = "token"
    aggregate: Literal["token_mean", "sequence_mean", "fixed"] = "token_mean"
    fixed_divisor: float | None = None
    kl_coef: float = 0.0
    max_staleness: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, SamplingConfig):
            raise InvalidInputError("sampling", "a SamplingConfig", self.sampling)
        if self.sampling.temperature == 0.0:
            raise InvalidInputError("sampling.temperature", "above 0: greedy tokens have no likelihood ratio", 0.0)
        for name, off in (("top_p", 1.0), ("top_k", 0), ("min_tokens", 0)):
            if (value := getattr(self.sampling, name)) != off:
                raise InvalidInputError(f"sampling.{name}", f"{off}: a ratio to a cut distribution is undefined", value)
        for name, choices in (
            ("advantage", ("group", "tree")), ("divide_by_std", (True, False)), ("old", ("step", "behaviour")),
            ("weight_level", ("token", "sequence")), ("ratio", ("token", "sequence")),
            ("aggregate", ("token_mean", "sequence_mean", "fixed")),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in choices:
                raise InvalidInputError(name, "one of " + ", ".join(map(str, choices)), value)
        for name, low, high in (
            ("clip_low", 0.0, math.inf), ("clip_high", 0.0, math.inf), ("weight_cap", 1.0, math.inf),
            ("fixed_divisor", 1.0, 1e12), ("kl_coef", 0.0, 1e12), ("max_staleness", 0, 2**31),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in ("weight_cap", "fixed_divisor", "max_staleness"):
                continue
            number = isinstance(value, int if name == "max_staleness" else (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                raise InvalidInputError(name, f"a number in [{low:g}, {high:g}]", value)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How the estimator's gradient is followed.

    Attributes:
        learning_rate, betas, eps, weight_decay: of AdamW, if the trainer makes the optimizer.
        warmup_updates: the learning rate of update n (from 1) is scaled by min(1, n / warmup_updates).
        max_grad_norm: gradients are scaled down to this norm over all parameters; `None` leaves them.
        num_epochs, num_minibatches: updates per step. More than one moves the policy away from where the step began,
            which is what the clip is for.
        micro_batch_tokens: a micro-batch has at most so many tokens, padding included, or one trajectory.
        share_prefixes: forward tokens that trajectories of a micro-batch share, a long prompt or what is before a
            branch, once for all of them; see `prefix_packing` for what the model must take.
        seed: of the order of the trajectories.

    Raises:
        InvalidInputError: a field is not what it should be.

    """

    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_updates: int = 0
    max_grad_norm: float | None = 1.0
    num_epochs: int = 1
    num_minibatches: int = 1
    micro_batch_tokens: int = 16384
    share_prefixes: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("warmup_updates", "num_epochs", "num_minibatches", "micro_batch_tokens", "seed"):
            value, low = getattr(self, name), int(name.startswith(("num", "micro")))
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**63:
                raise InvalidInputError(name, f"a whole number, at least {low}", value)
        if not isinstance(self.share_prefixes, bool):
            raise InvalidInputError("share_prefixes", "true or false", self.share_prefixes)
        for name in ("learning_rate", "eps", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if value is None and name == "max_grad_norm":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf or (value == 0 and name in ("eps", "max_grad_norm")):
                raise InvalidInputError(name, "a finite number, at least 0 (eps, max_grad_norm: above 0)", value)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InvalidInputError("betas", "two numbers in [0, 1)", self.betas)
