"""What the scheduler is told of a tree that goes on in another round, over plain data."""

from __future__ import annotations

import dataclasses

from longtail.engine.config import SamplingConfig
from longtail.engine.group_state import GroupState, RunPolicy
from longtail.engine.prompts import TokenPrompt
from longtail.engine.trajectory import Timings, TokenCounts, Trajectory, VersionSpan
from longtail.engine.tree_members import Orphans
from longtail.scheduler.metadata import CUT_STOP_REASON
from longtail.scheduler.tree_place import DISMISSED_STOP_REASON
from longtail.scheduler.tree_policy import TreeSpec

SPEC = TreeSpec(width=5, depth=4, segment_tokens=2, split="logprob")
PARKLESS = RunPolicy("w", target_groups=1, kv_policy="fresh", park=False, can_fork=True)


def member(index: int, num_tokens: int, finish_reason: str, stop_reason: str | None = None) -> Trajectory:
    return Trajectory(
        trajectory_id=f"r/0/{index}", round_id="r", group_id="g", index=index, prompt_token_ids=[5],
        output_token_ids=[7] * num_tokens, logprobs=[-1.0] * num_tokens, source_mask=[1] * num_tokens,
        weight_versions=[VersionSpan("0", 0, num_tokens)] if num_tokens else [],
        segments=[], finish_reason=finish_reason, stop_reason=stop_reason,
        timings=Timings(submitted_s=0.0), tokens=TokenCounts(), metadata={},
    )  # fmt: skip


def group(tree: TreeSpec | None = SPEC) -> GroupState:
    """Member 0 was dismissed, 1 was cut, 2 and 4 ended, 3 has not begun."""
    sampling = SamplingConfig(max_tokens=8, tree=tree)
    state = GroupState.new(0, 0, "r", TokenPrompt("g", [5], None, None, {}), 5, sampling)
    state.members = [
        member(0, 0, "abort", DISMISSED_STOP_REASON),
        member(1, 3, "abort", CUT_STOP_REASON),
        member(2, 5, "stop"),
        None,
        member(4, 8, "length"),
    ]
    return state


def test_a_tree_goes_on_with_what_ended_in_the_first_that_is_submitted() -> None:
    state = group()
    assert state.unfinished == [1, 3]
    first, second = (plan.metadata.tree for plan in state.plans(PARKLESS, "g", state.unfinished))
    assert first is not None
    assert second is not None
    assert (first.path, first.has_begun, first.sums) == (1, True, [-2.0, -3.0])
    assert (second.path, second.has_begun, second.ended) == (3, False, [])
    assert [(one.path, len(one.token_ids), one.by_itself) for one in first.ended] == [
        (0, 0, False),
        (2, 5, True),
        (4, 8, False),
    ]
    assert {one.park for one in first.ended} == {state.park_key(index) for index in (0, 2, 4)}
    first.check("tree")


def test_members_of_a_tree_park_and_are_not_forked_by_hand() -> None:
    """A tree in a journal may go on in a round that neither parks nor grows trees; its other groups do as it says."""
    for plan in group().plans(PARKLESS, "g", [1, 3]):
        assert (plan.metadata.park, plan.metadata.can_fork) == (f"0.0.{plan.index}", False)
    for plan in group(None).plans(dataclasses.replace(PARKLESS, can_fork=False), "g", [1, 3]):
        assert plan.metadata.park is None
    for plan in group(None).plans(dataclasses.replace(PARKLESS, park=True), "g", [1, 3]):
        assert plan.metadata.can_fork


def test_orphans_wait_for_their_own_parent() -> None:
    orphans: Orphans[str] = Orphans()
    orphans.wait("a", 1, "x")
    orphans.wait("a", 1, "y")
    orphans.wait("b", 1, "z")
    assert list(orphans.of("a", 2)) == []
    assert list(orphans.of("a", 1)) == ["x", "y"]
    assert list(orphans.of("a", 1)) == []
    assert list(orphans.of("b", 1)) == ["z"]
