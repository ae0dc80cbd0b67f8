"""Trajectories, groups, and `Hooks` that are closed after the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from longtail.engine.trajectory import Group, KvSpan, Segment, Timings, TokenCounts, Trajectory, VersionSpan
from longtail.hooks import Hooks

MakeTrajectory = Callable[..., Trajectory]
MakeGroup = Callable[..., Group]
StartHooks = Callable[..., Hooks]


def make_trajectory(index: int = 0, **changes: Any) -> Trajectory:
    fields: dict[str, Any] = {
        "trajectory_id": f"r/g/{index}", "round_id": "r", "group_id": "g", "index": index, "prompt_token_ids": [1, 2],
        "output_token_ids": [4, 5, 6], "logprobs": [-0.1, -0.2, -0.3], "source_mask": [1, 0, 1],
        "weight_versions": [VersionSpan("a", 0, 2), VersionSpan("b", 2, 3)],
        "segments": [Segment(start=0, end=3, kv_versions=[KvSpan("a", 0, 3)])], "finish_reason": "stop",
        "text": "4 5 6", "timings": Timings(submitted_s=0.0), "tokens": TokenCounts(), "metadata": {"task": "count"},
    }  # fmt: skip
    return Trajectory(**(fields | changes))


def make_group(rewards: list[float | None] | int = 2, **changes: Any) -> Group:
    given = [None] * rewards if isinstance(rewards, int) else rewards
    trajectories = [make_trajectory(index, reward=reward) for index, reward in enumerate(given)]
    return Group(**({"group_id": "g", "trajectories": trajectories, "complete": True} | changes))


@pytest.fixture(scope="session")
def trajectory() -> MakeTrajectory:
    """`trajectory(index, **changes)`: three output tokens, the second of them the environment's."""
    return make_trajectory


@pytest.fixture(scope="session")
def group() -> MakeGroup:
    """`group(2)` has two trajectories without reward, `group([0.0, 1.0])` two with."""
    return make_group


@pytest.fixture
def start() -> Iterator[StartHooks]:
    """`start(hook, ..., max_threads=8)`: running hooks."""
    with ExitStack() as running:
        yield lambda *hooks, **options: running.enter_context(Hooks(hooks, **options))
