"""A bridge client without a bridge: samples with transformers from the weights that were pushed last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from longtail.engine.config import SamplingConfig
from longtail.engine.trajectory import (
    Group,
    Round,
    RoundStats,
    Timings,
    TokenCounts,
    Trajectory,
    VersionSpan,
)

_NO_STATS = RoundStats(
    num_submitted_groups=0, num_complete_groups=0, num_cut_groups=0, num_failed_groups=0, num_cut_members=0,
    num_output_tokens=0, num_kept_tokens=0, num_scheduled_tokens=0, num_recomputed_tokens=0, num_steps=0,
    idle_slot_steps=0, peak_running=0, seconds=0.0,
)  # fmt: skip


class FakeService:
    """Has what the TRL adapter uses of a `BridgeClient`, and records it.

    Of `over_provision * target_groups` groups in flight, the first round that carries returns the newest, and each
    later one the oldest, which an earlier round began.
    """

    address = "fake"

    def __init__(self, folder: Path, *, weight_version: int = 0, weights_needed: int | None = None) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.weight_version = weight_version
        self.weights_needed = weights_needed
        self.calls: list[str] = []
        self.sampling: list[SamplingConfig] = []
        self.closed = False
        self._generator = torch.Generator().manual_seed(0)
        self._carried: list[tuple[int, Any]] = []
        self._position = 0
        self._num_rounds = 0

    def push_weights(self, named_tensors: Any, version: int, **options: Any) -> None:
        assert version > self.weight_version
        assert version >= (self.weights_needed or 0)
        state = dict(named_tensors)
        self.model.load_state_dict(state)
        self.weight_version = version
        self.weights_needed = None
        self.calls.append(f"push {version}")

    def ack(self) -> None:
        self.calls.append("ack")

    def close(self) -> None:
        self.closed = True

    def rollout(
        self,
        prompts: Any,
        *,
        group_size: int,
        target_groups: int | None,
        over_provision: float | None,
        sampling: SamplingConfig,
        carry: bool,
        timeout_s: float | None,
    ) -> Round:
        self.calls.append("carry" if carry else "round")
        self.sampling.append(sampling)
        if carry:
            assert target_groups is not None
            assert over_provision is not None
            while len(self._carried) < over_provision * target_groups:
                self._carried.append((self._position, prompts[self._position]))
                self._position += 1
            if self._num_rounds == 0:
                self._carried.reverse()
            drawn, self._carried = self._carried[:target_groups], self._carried[target_groups:]
        else:
            drawn = [(i, prompts[i]) for i in reversed(range(len(prompts)))]  # in the order of their completion
        round_id = f"r{self._num_rounds}"
        self._num_rounds += 1
        groups = [
            Group(
                group_id=prompt.group_id or str(position),
                trajectories=[
                    self._sample(prompt, round_id, str(position), i, sampling, stale=carry) for i in range(group_size)
                ],
                complete=True,
            )
            for position, prompt in drawn
        ]
        return Round(round_id=round_id, target_groups=len(groups), groups=groups, stats=_NO_STATS, carry=None)

    def _sample(
        self, prompt: Any, round_id: str, group_id: str, index: int, sampling: SamplingConfig, *, stale: bool
    ) -> Trajectory:
        token_ids, output, logprobs = list(prompt.token_ids), [], []
        with torch.no_grad():
            while len(output) < sampling.max_tokens and not (output and output[-1] in sampling.stop_token_ids):
                logits = self.model(torch.tensor([token_ids + output])).logits[0, -1] / sampling.temperature
                distribution = logits.log_softmax(-1)
                token_id = int(torch.multinomial(distribution.exp(), 1, generator=self._generator))
                output.append(token_id)
                logprobs.append(float(distribution[token_id]))
        mask = [1] * len(output)
        return Trajectory(
            trajectory_id=f"{round_id}/{group_id}/{index}", round_id=round_id, group_id=group_id, index=index,
            prompt_token_ids=token_ids, output_token_ids=output, logprobs=logprobs, source_mask=mask,
            loss_mask=[0, *mask[1:]] if stale else mask,
            weight_versions=[VersionSpan(str(self.weight_version), 0, len(output))],
            finish_reason="stop" if output[-1] in sampling.stop_token_ids else "length",
            timings=Timings(submitted_s=0.0), tokens=TokenCounts(), metadata=dict(prompt.metadata),
        )  # fmt: skip
