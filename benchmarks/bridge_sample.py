"""A round of made-up trajectories, as the arms of `bridge.py` send it."""

from __future__ import annotations

import numpy as np

from longtail.engine.trajectory import Group, Round, RoundStats, Timings, TokenCounts, Trajectory, VersionSpan

NUM_TOKENS, NUM_PROMPT_TOKENS, GROUP_SIZE = 1000, 100, 8


def sample_round(round_id: str, num_trajectories: int) -> Round:
    """Groups of 8 trajectories of 1,000 tokens; ids and log-probabilities like a model's."""
    rng = np.random.default_rng(0)
    groups = [
        Group(group_id=str(g), trajectories=[_trajectory(rng, g, i) for i in range(GROUP_SIZE)], complete=True)
        for g in range(num_trajectories // GROUP_SIZE)
    ]
    num_tokens = num_trajectories * NUM_TOKENS
    stats = RoundStats(
        num_submitted_groups=len(groups), num_complete_groups=len(groups), num_cut_groups=0, num_failed_groups=0,
        num_cut_members=0, num_output_tokens=num_tokens, num_kept_tokens=num_tokens, num_scheduled_tokens=num_tokens,
        num_recomputed_tokens=0, num_steps=0, idle_slot_steps=0, peak_running=0, seconds=0.0,
    )  # fmt: skip
    return Round(round_id=round_id, target_groups=len(groups), groups=groups, stats=stats)


def _trajectory(rng: np.random.Generator, group: int, index: int) -> Trajectory:
    logprobs = -rng.exponential(0.5, NUM_TOKENS).astype(np.float32)
    return Trajectory(
        trajectory_id=f"r/{group}.0/{index}", round_id="r", group_id=str(group), index=index,
        prompt_token_ids=rng.integers(0, 49_152, NUM_PROMPT_TOKENS).tolist(),
        output_token_ids=rng.integers(0, 49_152, NUM_TOKENS).tolist(), logprobs=logprobs.tolist(),
        source_mask=[1] * NUM_TOKENS, weight_versions=[VersionSpan("3", 0, NUM_TOKENS)], finish_reason="stop",
        timings=Timings(submitted_s=0.0), tokens=TokenCounts(scheduled=NUM_PROMPT_TOKENS + NUM_TOKENS),
    )  # fmt: skip
