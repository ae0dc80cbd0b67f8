"""A training run over the bridge, step by step: roll out, reward, train, push the new weights.

`TrainingLoop` is one trainer with one engine. It keeps nothing that survives it; a trainer that is to be restarted
saves `BridgeClient.cursor` in its checkpoints and acknowledges after each, see `client.py`. Here every step is
acknowledged when it is over.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from longtail.engine.config import SamplingConfig
from longtail.engine.trajectory import Group, Round, Trajectory
from longtail.trainer_bridge.client import BridgeClient
from longtail.trainer_bridge.grpo_trainer import GrpoTrainer

#: What a trajectory earns.
Reward = Callable[[Trajectory], float]

_EVALUATION_SEED = 2024


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What a step is.

    Attributes:
        group_size: samples of each prompt. `target_groups` groups make a step.
        over_provision: groups in flight for each group of the target: 1 waits for all of a round, more carries the
            unfinished ones over.
        sampling: how they are sampled.

    """

    group_size: int = 8
    target_groups: int = 8
    over_provision: float = 2.0
    sampling: SamplingConfig = SamplingConfig()


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One step.

    Attributes:
        step: from 1.
        version: of the weights that it began with.
        reward, reward_std: mean and standard deviation over its trajectories.
        mean_length, max_length: of their outputs, in tokens.
        staleness: share of their tokens by age in versions.
        num_tokens: generated in the rollout, those of unfinished trajectories included.
        idle_share: of the slots of the batch, over the engine's steps.
        rollout_s, train_s, update_s: wall time. The update is the push of the weights, until the engine has them.
        pause_s: for how long the engine could make no step because of it.
        grad_norm: before it was cut. `lag_kl` and `ess` say how far the trajectories are off-policy, see `StepStats`.

    """

    step: int
    version: int
    reward: float
    reward_std: float
    mean_length: float
    max_length: int
    staleness: dict[int, float]
    num_tokens: int
    idle_share: float
    rollout_s: float
    train_s: float
    update_s: float
    pause_s: float
    grad_norm: float
    lag_kl: float
    ess: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.rollout_s + self.train_s + self.update_s

    @property
    def tokens_per_s(self) -> float:
        """Generated, in the time of the rollout."""
        return self.num_tokens / self.rollout_s

    @property
    def mean_staleness(self) -> float:
        """Of a token, in versions."""
        return sum(age * share for age, share in self.staleness.items())


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Answers to prompts that are not trained on, sampled as in training, with the same seeds each time.

    Attributes:
        step: after which it was made; 0 is before the first.
        reward: mean over the trajectories.
        mean_length: in tokens.
        seconds: wall time.
        trajectories: with their rewards.

    """

    step: int
    reward: float
    mean_length: float
    seconds: float
    trajectories: list[Trajectory] = []


class TrainingLoop:
    """Trains on rounds from `client`, and gives it the weights of `trainer`.

    Args:
        client: of an engine with the trainer's weights.
        trainer: see `GrpoTrainer`.
        prompts: of the whole run, see `BridgeClient.rollout`.
        reward: of a trajectory.
        config: what a step is.

    """

    def __init__(
        self, client: BridgeClient, trainer: GrpoTrainer, prompts: Sequence[Any], reward: Reward, config: LoopConfig
    ) -> None:
        self.num_steps = 0
        self._client = client
        self._trainer = trainer
        self._prompts = prompts
        self._reward = reward
        self._config = config
        self._version = client.weight_version

    def roll_out(self, on_trajectory: Callable[[Trajectory], None] | None = None) -> Round:
        """The next step's round; `on_trajectory` is called about when one ends."""
        config = self._config
        return self._client.rollout(
            self._prompts,
            group_size=config.group_size,
            target_groups=config.target_groups,
            over_provision=config.over_provision,
            sampling=config.sampling,
            round_id=f"step-{self.num_steps + 1}",
            on_trajectory=on_trajectory,
        )

    def step(
        self,
        on_trajectory: Callable[[Trajectory], None] | None = None,
        on_phase: Callable[[str], None] | None = None,
    ) -> StepRecord:
        """One step; `on_phase` is told what begins: `rollout`, `train`, `update`.

        Raises:
            BridgeError: the engine is gone, or refuses.

        """
        tell = on_phase or (lambda _phase: None)
        start_s = time.perf_counter()
        tell("rollout")
        round_ = self.roll_out(on_trajectory)
        rolled_out_s = time.perf_counter()
        tell("train")
        groups = [self._rewarded(group) for group in round_.complete_groups]
        stats = self._trainer.step(groups, self._version)
        trained_s = time.perf_counter()
        tell("update")
        report = self._client.push_weights(self._trainer.named_tensors(), self._version + 1)
        self._client.ack()
        updated_s = time.perf_counter()
        rewards = [trajectory.reward or 0.0 for group in groups for trajectory in group.trajectories]
        self.num_steps += 1
        self._version += 1
        cost = round_.stats
        return StepRecord(
            step=self.num_steps,
            version=stats.version,
            reward=stats.mean_reward,
            reward_std=math.sqrt(sum((reward - stats.mean_reward) ** 2 for reward in rewards) / len(rewards)),
            mean_length=stats.mean_length,
            max_length=max(len(t.output_token_ids) for group in groups for t in group.trajectories),
            staleness={age: tokens / stats.num_model_tokens for age, tokens in stats.staleness.items()},
            num_tokens=cost.num_output_tokens,
            idle_share=cost.idle_slot_steps / max(1, cost.peak_running * cost.num_steps),
            rollout_s=rolled_out_s - start_s,
            train_s=trained_s - rolled_out_s,
            update_s=updated_s - trained_s,
            pause_s=report.pause_s,
            grad_norm=stats.grad_norm,
            lag_kl=stats.lag_kl,
            ess=stats.ess,
        )

    def evaluate(self, prompts: Sequence[Any]) -> Evaluation:
        """Answers to these prompts by the weights of now, in a round of their own."""
        start_s = time.perf_counter()
        sampling = dataclasses.replace(self._config.sampling, seed=_EVALUATION_SEED)
        round_ = self._client.rollout(prompts, sampling=sampling, carry=False, round_id=f"evaluation-{self.num_steps}")
        seconds = time.perf_counter() - start_s
        self._client.ack()
        trajectories = [t for group in round_.complete_groups for t in self._rewarded(group).trajectories]
        count = len(trajectories)
        return Evaluation(
            step=self.num_steps,
            reward=sum(t.reward or 0.0 for t in trajectories) / count,
            mean_length=sum(len(t.output_token_ids) for t in trajectories) / count,
            seconds=seconds,
            trajectories=trajectories,
        )

    def _rewarded(self, group: Group) -> Group:
        replace = msgspec.structs.replace
        return replace(group, trajectories=[replace(t, reward=self._reward(t)) for t in group.trajectories])
