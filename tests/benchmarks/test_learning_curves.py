"""Times to a reward and what is made of them, on curves whose answers are known."""

from __future__ import annotations

from pathlib import Path

import learning_picture
import pytest
from learning_curves import ARMS, Curve, figures_of, plain

from longtail.trainer_bridge.demo.loop import Evaluation, StepRecord


def a_curve(arm: str, seed: int, rewards: list[float], step_s: float, every: int = 2) -> Curve:
    """An evaluation every `every` steps of `step_s` seconds each."""
    steps = [
        StepRecord(
            step=number, version=number - 1, reward=0.5, reward_std=0.5, mean_length=60.0, max_length=400,
            staleness={0: 0.75, 1: 0.25}, num_tokens=1000, idle_share=0.5, rollout_s=0.5 * step_s,
            train_s=0.25 * step_s, update_s=0.25 * step_s, pause_s=0.0, grad_norm=0.1, lag_kl=0.0, ess=1.0,
        )
        for number in range(1, every * (len(rewards) - 1) + 1)
    ]  # fmt: skip
    evaluations = [
        Evaluation(step=i * every, reward=reward, mean_length=60.0, seconds=9.0) for i, reward in enumerate(rewards)
    ]
    return Curve(arm, seed, steps, evaluations)


LINE = [0.1 * i for i in range(9)]


def test_a_straight_curve_is_reached_where_it_is() -> None:
    curve = a_curve("sync", 0, LINE, step_s=3.0)
    assert [reward for _, reward in curve.points] == pytest.approx(LINE)
    assert curve.final_reward == pytest.approx(0.7)
    assert curve.time_to(0.35) == pytest.approx(3.5 * 2 * 3.0)
    assert curve.time_to(0.0) == 0.0
    assert curve.time_to(0.01) == pytest.approx(0.1 * 2 * 3.0)
    assert curve.time_to(0.81) is None
    bumpy = a_curve("sync", 0, [0.0, 0.3, 0.0, 0.3, 0.6], step_s=3.0)
    assert [reward for _, reward in bumpy.points] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.6])


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_the_speedup_of_equal_curves_is_the_ratio_of_their_step_times(factor: float) -> None:
    curves = [a_curve(arm, seed, LINE, 2.0 * (factor if arm == "sync" else 1)) for seed in range(3) for arm in ARMS]
    figures = figures_of(curves)
    assert figures["time_to_reward_speedup"] == pytest.approx(factor)
    assert figures["time_to_reward_speedup_range"] == pytest.approx([factor, factor])
    assert figures["final_reward_sync"] == figures["final_reward_partial"]
    assert figures["speedup_by_share"]["0.5"] == pytest.approx([factor] * 3)
    assert figures["step_seconds"]["partial"] == {"rollout": 1.0, "train": 0.5, "update": 0.5}
    assert figures["off_policy_share"]["sync"] == 0.25


def test_slower_learning_makes_up_for_faster_steps() -> None:
    """Twice as fast a step at half the progress gains nothing."""
    slow, fast = a_curve("sync", 0, LINE, 2.0), a_curve("partial", 0, _stretched(), 1.0)
    assert figures_of([slow, fast])["time_to_reward_speedup"] == pytest.approx(1.0, rel=0.02)


def test_a_reward_that_is_not_reached_is_none() -> None:
    figures = figures_of([a_curve("sync", 0, LINE, 2.0), a_curve("partial", 0, [0.0] * 9, 1.0)])
    assert figures["time_to_reward_speedup"] is None
    assert figures["speedup_by_share"]["0.95"] == [None]


def test_the_picture_and_what_is_kept(tmp_path: Path) -> None:
    curves = [a_curve(arm, seed, LINE, 2.0) for seed in range(2) for arm in ARMS]
    learning_picture.draw(tmp_path / "learning.png", curves, figures_of(curves))
    assert (tmp_path / "learning.png").read_bytes()[1:4] == b"PNG"
    assert plain(curves)[1]["evaluations"][2] == {"step": 4, "reward": 0.2, "mean_length": 60.0, "seconds": 9.0}


def _stretched() -> list[float]:
    """The line at half its slope, with twice as many points."""
    return [0.05 * i for i in range(17)]
