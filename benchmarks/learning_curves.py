"""What `learning.py` makes of its steps and evaluations: smoothed rewards, times to a reward, and the figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import bench_io
import msgspec

from longtail.trainer_bridge.demo.loop import Evaluation, StepRecord

#: Over-provision by arm.
ARMS = {"sync": 1.0, "partial": 2.0}
TARGET_SHARE = 0.95
SHARES = (0.5, 0.8, 0.9, TARGET_SHARE, 1.0)


@dataclass
class Curve:
    """What one arm did with one seed; `wall_s` is the time behind each step, and behind each evaluation."""

    arm: str
    seed: int
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def wall_s(self) -> list[float]:
        """After each step, from 0 before the first."""
        total = [0.0]
        for step in self.steps:
            total.append(total[-1] + step.seconds)
        return total

    @property
    def points(self) -> list[tuple[float, float]]:
        """Wall time and smoothed reward of each evaluation."""
        rewards = [evaluation.reward for evaluation in self.evaluations]
        inner = [fmean(rewards[i - 1 : i + 2]) for i in range(1, len(rewards) - 1)]
        smooth = [*rewards[:1], *inner, *rewards[1:][-1:]]
        wall_s = self.wall_s
        return [(wall_s[e.step], reward) for e, reward in zip(self.evaluations, smooth, strict=True)]

    @property
    def final_reward(self) -> float:
        """See the module."""
        return fmean(evaluation.reward for evaluation in self.evaluations[-3:])

    def time_to(self, reward: float) -> float | None:
        """Wall time at which the smoothed reward is first reached."""
        before: tuple[float, float] | None = None
        for seconds, reached in self.points:
            if reached >= reward:
                if before is None:
                    return seconds
                share = (reward - before[1]) / (reached - before[1])
                return before[0] + share * (seconds - before[0])
            before = (seconds, reached)
        return None


def figures_of(curves: list[Curve]) -> dict[str, Any]:
    """What the docstring names."""
    by_arm = {arm: [curve for curve in curves if curve.arm == arm] for arm in ARMS}
    steps = {arm: [step for curve in own for step in curve.steps] for arm, own in by_arm.items()}
    speedups = {
        share: [
            _speedup(sync, partial, share)
            for sync, partial in zip(by_arm["sync"], by_arm["partial"], strict=True)
        ]
        for share in SHARES
    }  # fmt: skip
    reached = [speedup for speedup in speedups[TARGET_SHARE] if speedup is not None]
    main = bench_io.ratio_figures("time_to_reward_speedup", reached) if reached else {"time_to_reward_speedup": None}

    def mean(name: str) -> dict[str, float]:
        return {arm: round(fmean(getattr(step, name) for step in own), 3) for arm, own in steps.items()}

    seconds = {name: mean(f"{name}_s") for name in ("rollout", "train", "update")}
    return {
        **main,
        "speedup_by_share": {
            str(share): [None if x is None else round(x, 3) for x in found] for share, found in speedups.items()
        },
        **{f"final_reward_{arm}": _spread([curve.final_reward for curve in own]) for arm, own in by_arm.items()},
        "first_reward": round(fmean(curve.evaluations[0].reward for curve in curves), 4),
        "step_seconds": {arm: {name: by[arm] for name, by in seconds.items()} for arm in ARMS},
        "idle_share": mean("idle_share"),
        "off_policy_share": {
            arm: round(fmean(1 - step.staleness.get(0, 0.0) for step in own), 3) for arm, own in steps.items()
        },
        "tokens_per_s": mean("tokens_per_s"),
        "update_s": {arm: round(bench_io.median([step.update_s for step in own]), 4) for arm, own in steps.items()},
    }


def _speedup(sync: Curve, partial: Curve, share: float) -> float | None:
    first = sync.evaluations[0].reward
    reward = first + share * (sync.final_reward - first)
    ours, theirs = partial.time_to(reward), sync.time_to(reward)
    return theirs / ours if ours and theirs else None


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": round(fmean(values), 4),
        "spread": [round(min(values), 4), round(max(values), 4)],
        "by_seed": [round(value, 4) for value in values],
    }


def plain(curves: list[Curve]) -> list[dict[str, Any]]:
    """Of JSON values, and short enough to be kept in a repository."""
    return [
        {
            "arm": curve.arm,
            "seed": curve.seed,
            "steps": [_rounded(step) for step in curve.steps],
            "evaluations": [_rounded(evaluation) for evaluation in curve.evaluations],
        }
        for curve in curves
    ]


def _rounded(record: StepRecord | Evaluation) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(record, str_keys=True)
    plain.pop("trajectories", None)
    return {name: _round(value) for name, value in plain.items()}


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _round(inner) for key, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value
