"""Boundaries in a running engine: what hooks decide, against fresh requests over the same tokens."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longtail.engine import EngineConfig, Prompt, RolloutEngine, SamplingConfig, Trajectory
from longtail.engine.carry_book import CarryBook
from longtail.engine.carry_config import CarryConfig
from longtail.engine.errors import InvalidInputError
from longtail.engine.trajectory import Boundary, Round
from longtail.hooks import Append, Continue, Decision, Fork, Hooks, Stop

_rng = random.Random(9)
PROMPTS = [Prompt(token_ids=[_rng.randrange(3, 512) for _ in range(_rng.randint(20, 60))]) for _ in range(40)]
GREEDY = SamplingConfig(temperature=0.0, ignore_eos=True, max_tokens=120, boundary_every=16)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[RolloutEngine]:
    config = EngineConfig(
        model=str(tiny_model), carry=CarryConfig(), block_size=32, max_model_len=512, max_num_seqs=16, kv_cache_gib=0.05
    )
    with RolloutEngine(config) as running:
        yield running


class Decides:
    """A hook that answers with what a function says of the trajectory and its boundary."""

    time_limit_s = 20.0
    on_failure = "raise"

    def __init__(self, decide: Any, **attributes: Any) -> None:
        self._decide = decide
        self.seen: list[tuple[Trajectory, Boundary]] = []
        vars(self).update(attributes)

    def on_boundary(self, trajectory: Trajectory, boundary: Boundary) -> Decision:
        self.seen.append((trajectory, boundary))
        answer: Decision = self._decide(trajectory, boundary)
        return answer


def rollout(engine: RolloutEngine, hook: object, sampling: SamplingConfig, **changes: Any) -> Round:
    """One round over an empty book."""
    inner = engine._engine
    assert inner.book is not None
    inner.book.close()
    with Hooks([hook]) as hooks:
        inner.hooks, inner.book = hooks, CarryBook(CarryConfig(), hooks, inner.driver.weight_version)
        arguments: dict[str, Any] = {"target_groups": 3, "sampling": sampling}
        return engine.rollout(PROMPTS, **(arguments | changes))


def check_segments(engine: RolloutEngine, trajectory: Trajectory, sampling: SamplingConfig) -> None:
    """After what the environment appended comes what a fresh request over all tokens before samples."""
    plain = dataclasses.replace(sampling, boundary_every=None, boundary_token_ids=(), boundary_strings=())
    tokens, mask = trajectory.output_token_ids, trajectory.source_mask
    starts = [position for position in range(len(tokens)) if mask[position] and not (position and mask[position - 1])]
    for start in starts:
        end = next((position for position in range(start, len(tokens)) if not mask[position]), len(tokens))
        fresh = Prompt(token_ids=[*trajectory.prompt_token_ids, *tokens[:start]], max_tokens=end - start)
        (expected,) = engine.rollout([fresh], sampling=plain, carry=False).trajectories
        assert tokens[start:end] == expected.output_token_ids
        assert trajectory.logprobs[start:end] == pytest.approx(expected.logprobs, abs=1e-5)


def test_continuing_changes_nothing_and_costs_nothing(engine: RolloutEngine) -> None:
    hook = Decides(lambda trajectory, boundary: Continue())
    got = rollout(engine, hook, GREEDY)
    assert len(got.trajectories) == 3
    for trajectory in got.trajectories:
        check_segments(engine, trajectory, GREEDY)
        assert len(trajectory.output_token_ids) == 120
        assert trajectory.boundaries == [Boundary(start=start, end=start + 16) for start in range(0, 112, 16)]
        assert trajectory.tokens.recomputed == 0
        assert trajectory.tokens.scheduled + trajectory.tokens.cached == len(trajectory.prompt_token_ids) + 119
    assert all(trajectory.text for trajectory, _ in hook.seen)


def test_what_the_environment_appends_is_prefilled_and_nothing_else(engine: RolloutEngine) -> None:
    def observe(trajectory: Trajectory, boundary: Boundary) -> Decision:
        return Append([7 + len(trajectory.boundaries)] * 5) if len(trajectory.boundaries) % 2 else Continue()

    got = rollout(engine, Decides(observe), GREEDY)
    for trajectory in got.trajectories:
        num_appended = sum(boundary.num_appended for boundary in trajectory.boundaries)
        assert num_appended == trajectory.source_mask.count(0) == trajectory.loss_mask.count(0) >= 15
        values = zip(trajectory.logprobs, trajectory.source_mask, strict=True)
        assert all(logprob == 0.0 for logprob, source in values if not source)
        first = trajectory.boundaries[0]
        assert trajectory.output_token_ids[first.end : first.end + 5] == [8] * 5
        check_segments(engine, trajectory, GREEDY)
        assert trajectory.tokens.recomputed == 0
        # Every token but the last went through the model, or was in the prefix cache of an earlier test, once.
        num_tokens = len(trajectory.prompt_token_ids) + len(trajectory.output_token_ids)
        assert trajectory.tokens.scheduled + trajectory.tokens.cached == num_tokens - 1


def test_seeded_sampling_goes_on_where_it_was(engine: RolloutEngine) -> None:
    """Tokens of the environment draw nothing: without them the trajectory is what it would have been."""
    sampling = dataclasses.replace(GREEDY, temperature=1.0, seed=3)
    got = rollout(engine, Decides(lambda trajectory, boundary: Continue()), sampling)
    plain = dataclasses.replace(sampling, boundary_every=None)
    whole = engine.rollout(PROMPTS[:3], sampling=plain, carry=False).trajectories
    assert {tuple(t.output_token_ids) for t in got.trajectories} == {tuple(t.output_token_ids) for t in whole}
    appended = rollout(
        engine, Decides(lambda t, b: Append([9, 9, 9]) if len(t.boundaries) == 1 else Continue()), sampling
    )
    for trajectory in appended.trajectories:
        fresh = Prompt(token_ids=[*trajectory.prompt_token_ids, *trajectory.output_token_ids[:19]], max_tokens=101)
        (other,) = engine.rollout([fresh], sampling=plain, carry=False).trajectories
        assert trajectory.output_token_ids[:16] in [t.output_token_ids[:16] for t in whole]
        assert trajectory.output_token_ids[19:] != other.output_token_ids, "its generator has drawn 16 numbers"


def test_a_tag_that_lies_across_tokens_ends_a_segment(engine: RolloutEngine) -> None:
    plain = dataclasses.replace(GREEDY, boundary_every=None)
    whole = engine.rollout(PROMPTS[:3], sampling=plain, carry=False)
    (first,) = [t for t in whole.trajectories if t.group_id == "0"]
    assert first.text is not None
    tag = first.text[30:36]
    sampling = dataclasses.replace(plain, boundary_strings=(tag,))
    hook = Decides(lambda trajectory, boundary: Continue())
    got = rollout(engine, hook, sampling)
    (trajectory,) = [t for t in got.trajectories if t.group_id == "0"]
    assert trajectory.output_token_ids == first.output_token_ids
    seen = [(one, boundary) for one, boundary in hook.seen if one.group_id == "0"]
    assert seen
    assert len(trajectory.boundaries) == len(seen)
    for one, boundary in seen:
        assert boundary.made_by == tag
        assert one.text is not None
        assert tag in one.text[-len(tag) - 8 :], "the token that completes it is the last"
    assert trajectory.boundaries[0].end - trajectory.boundaries[0].start > 1


def test_a_hook_stops_a_trajectory(engine: RolloutEngine) -> None:
    got = rollout(engine, Decides(lambda t, b: Stop() if len(t.boundaries) == 3 else Continue()), GREEDY)
    for trajectory in got.trajectories:
        assert (trajectory.finish_reason, trajectory.stop_reason) == ("stop", "rollout_boundary")
        assert len(trajectory.output_token_ids) == 48
        assert trajectory.text
    assert len(got.complete_groups) == 3
    assert engine.counters()["parked_trajectories"] == 0


def test_a_hook_forks_a_trajectory(engine: RolloutEngine) -> None:
    def fork(trajectory: Trajectory, boundary: Boundary) -> Decision:
        return Fork(2) if trajectory.branch is None and len(trajectory.boundaries) in (1, 3) else Continue()

    sampling = dataclasses.replace(GREEDY, temperature=1.0, seed=4)
    got = rollout(engine, Decides(fork), sampling, group_size=2)
    for group in got.groups:
        assert group.complete
        assert len(group.trajectories) == 2 + 2 * 2 * 2
        for branch in group.trajectories[2:]:
            assert branch.branch is not None
            assert branch.branch.at in (16, 48)
            assert branch.tokens.recomputed == 0
            parent = group.trajectories[branch.branch.of]
            assert branch.output_token_ids[: branch.branch.at] == parent.output_token_ids[: branch.branch.at]
        assert len({tuple(t.output_token_ids) for t in group.trajectories}) == 10


@pytest.mark.parametrize(("on_failure", "num_rejected"), [("reject", 1), ("ignore", 0)])
def test_a_failing_hook_has_the_outcome_that_it_names(
    engine: RolloutEngine, on_failure: str, num_rejected: int
) -> None:
    def fail(trajectory: Trajectory, boundary: Boundary) -> Decision:
        if trajectory.group_id == "1":
            raise RuntimeError("the database is gone")
        return Continue()

    got = rollout(engine, Decides(fail, on_failure=on_failure), GREEDY)
    assert len(got.groups) == 3
    assert len(got.filtered_groups) == num_rejected
    assert all("the database is gone" in str(group.rejected) for group in got.filtered_groups)


def test_tokens_that_the_model_does_not_know_filter_the_group(engine: RolloutEngine) -> None:
    got = rollout(engine, Decides(lambda t, b: Append([100_000]) if t.group_id == "0" else Continue()), GREEDY)
    assert len(got.groups) == 3
    (filtered,) = got.filtered_groups
    assert filtered.rejected == "on_boundary: appended 100000, expected token ids below 512"


def test_what_does_not_fit_into_the_budget_ends_the_trajectory(engine: RolloutEngine) -> None:
    got = rollout(engine, Decides(lambda t, b: Append([9] * 200)), GREEDY)
    for trajectory in got.trajectories:
        assert (trajectory.finish_reason, len(trajectory.output_token_ids)) == ("length", 16)


def test_a_fork_that_is_too_wide_filters_the_group(engine: RolloutEngine) -> None:
    got = rollout(engine, Decides(lambda t, b: Fork(70_000) if t.group_id == "0" else Continue()), GREEDY)
    assert len(got.groups) == 3
    (filtered,) = got.filtered_groups
    assert str(filtered.rejected).startswith("on_boundary: n: expected an integer in [1, 65536]")


def test_a_slow_decision_holds_up_nobody_else(engine: RolloutEngine) -> None:
    def slow(trajectory: Trajectory, boundary: Boundary) -> Decision:
        if trajectory.group_id == "0" and len(trajectory.boundaries) == 1:
            time.sleep(2.0)
        return Continue()

    ended: list[str] = []
    started = time.monotonic()
    got = rollout(engine, Decides(slow), GREEDY, on_trajectory=lambda one: ended.append(one.group_id))
    assert time.monotonic() - started > 2.0
    assert ended[-1] == "0"
    assert len(got.groups) == 3


def test_boundaries_without_a_hook_are_refused(engine: RolloutEngine) -> None:
    class Rewards:
        def on_trajectory(self, trajectory: Trajectory) -> Trajectory:
            return trajectory

    with pytest.raises(InvalidInputError, match=r"sampling\.boundary_every: expected nothing, without"):
        rollout(engine, Rewards(), GREEDY)
    with pytest.raises(InvalidInputError, match=r"sampling\.boundary_every"):
        engine.rollout(PROMPTS[:1], sampling=GREEDY, carry=False)
