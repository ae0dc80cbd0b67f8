"""Rewards of a round's trajectories: the score of the task's own verifier, kept in their metadata.

Scored is what ended by itself. A trajectory that was stopped has no answer yet, so it has no reward, which is not a
reward of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import msgspec
from rich.table import Table
from rich.text import Text

from longtail.engine.tasks import score
from longtail.engine.trajectory import Group, Round, Trajectory

REWARD = "reward"

_MAX_ROWS = 40


def scored(trajectory: Trajectory, task: str) -> Trajectory:
    """The trajectory with its reward in the metadata, if it has one."""
    if not trajectory.ended_by_itself:
        return trajectory
    reward = score(task, trajectory.text, trajectory.metadata)
    return msgspec.structs.replace(trajectory, metadata={**trajectory.metadata, REWARD: reward})


def with_trajectories(round: Round, trajectories: Sequence[Trajectory]) -> Round:
    """The round with other versions of its trajectories, found by their ids."""
    by_id = {trajectory.trajectory_id: trajectory for trajectory in trajectories}
    groups = [
        msgspec.structs.replace(group, trajectories=[by_id.get(t.trajectory_id, t) for t in group.trajectories])
        for group in round.groups
    ]
    return msgspec.structs.replace(round, groups=groups)


def mean_reward(trajectories: Sequence[Trajectory]) -> float | None:
    """Mean over those that have one."""
    rewards = [t.metadata[REWARD] for t in trajectories if REWARD in t.metadata]
    return fmean(rewards) if rewards else None


def groups_table(round: Round) -> Table:
    """One row a group: what became of it, how long its answers are, and how right."""
    table = Table(title="Groups", title_justify="left")
    table.add_column("group", style="bold", overflow="fold")
    table.add_column("state")
    for name in ("ended", "shortest", "longest", "mean reward"):
        table.add_column(name, justify="right")
    for group in round.groups[:_MAX_ROWS]:
        lengths = [len(t.output_token_ids) for t in group.trajectories if t.ended_by_itself]
        table.add_row(
            Text(group.group_id),
            _state(group),
            f"{len(lengths)}/{len(group.trajectories)}",
            *(f"{bound(lengths):,}" if lengths else "" for bound in (min, max)),
            _shown(mean_reward(group.trajectories)),
        )
    table.add_section()
    left_out = len(round.groups) - _MAX_ROWS
    name = "all complete ones" if left_out <= 0 else f"all complete ones ({left_out:,} groups not shown)"
    members = [t for group in round.complete_groups for t in group.trajectories]
    table.add_row(Text(name), "", f"{len(members)}", "", "", _shown(mean_reward(members)))
    return table


def _state(group: Group) -> Text:
    if group.complete:
        return Text("complete", style="green")
    was_cut = any(trajectory.was_cut for trajectory in group.trajectories)
    return Text("cut", style="yellow") if was_cut else Text("failed", style="red")


def _shown(reward: float | None) -> str:
    return "" if reward is None else f"{reward:.2f}"
