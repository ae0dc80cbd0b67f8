"""The picture of `learning.py`: reward against steps, and against wall time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from learning_curves import ARMS, Curve
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#5f6b76", "#e4e8ec"
COLORS = {"sync": "#c8553d", "partial": "#2f7fc1"}
WORDS = {"sync": "synchronous: waits for all answers", "partial": "partial rollouts: over-provision 2, carried over"}


def draw(path: Path, curves: list[Curve], figures: dict[str, Any]) -> None:
    """Write the picture; `figures` are those of `learning_curves.figures_of`."""
    style: Any = {
        "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
    }  # fmt: skip
    num_seeds = len({curve.seed for curve in curves})
    with mpl.rc_context(style):
        figure = Figure(figsize=(12, 5.2), dpi=120, facecolor="white")
        grid = figure.add_gridspec(1, 2, left=0.055, right=0.985, top=0.8, bottom=0.2, wspace=0.13)
        by_step, by_time = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
        for arm in ARMS:
            own = [curve for curve in curves if curve.arm == arm]
            _by_step(by_step, arm, own)
            _by_time(by_time, arm, own)
        top = max([1e-3, *(e.reward for curve in curves for e in curve.evaluations)])
        for panel in (by_step, by_time):
            panel.set_ylim(0, min(1.0, 1.15 * top))
            panel.set_xlim(left=0)
        by_step.set_xlabel("optimiser step")
        by_time.set_xlabel("seconds of generation, training and weight updates")
        by_step.set_ylabel("share of held-out problems solved")
        by_step.legend(loc="lower right", frameon=False)
        by_step.set_title("What a step teaches", loc="left", size=11.5, weight="bold")
        by_time.set_title("What a second teaches", loc="left", size=11.5, weight="bold")
        speedup = figures["time_to_reward_speedup"]
        gain = "" if speedup is None else f", which get there {speedup:.2f} times sooner"
        figure.text(0.055, 0.935, "Learning from partial rollouts", size=16, weight="bold")
        figure.text(
            0.055, 0.885,
            f"Final reward: {_words(figures, 'sync')} synchronous, {_words(figures, 'partial')} with partial rollouts"
            f"{gain}.",
            size=10.5, color=MUTED,
        )  # fmt: skip
        figure.text(
            0.055, 0.025,
            f"Lines: mean of {num_seeds} seeds; shaded: smallest and largest; dots: every evaluation. GRPO on Euclid's"
            " algorithm by subtraction, a task with long-tailed answers.\nEngine and trainer are two processes on one"
            " machine. Evaluations are not in the time; those of a seed are interpolated between its own times.",
            size=8.8, color=MUTED, linespacing=1.5,
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _words(figures: dict[str, Any], arm: str) -> str:
    final = figures[f"final_reward_{arm}"]
    low, high = final["spread"]
    return f"{final['mean']:.3f} ({low:.3f} to {high:.3f})"


def _by_step(panel: Axes, arm: str, curves: list[Curve]) -> None:
    rows = [[reward for _, reward in curve.points] for curve in curves]
    steps = [evaluation.step for evaluation in curves[0].evaluations]
    for curve in curves:
        panel.plot(steps, [e.reward for e in curve.evaluations], ".", color=COLORS[arm], alpha=0.35, ms=5)
    _band(panel, arm, np.array(steps, dtype=float), np.array(rows))


def _by_time(panel: Axes, arm: str, curves: list[Curve]) -> None:
    """On the times that every seed has reached."""
    end = min(curve.points[-1][0] for curve in curves)
    times = np.linspace(0.0, end, 200)
    for curve in curves:
        seconds = [second for second, _ in curve.points]
        panel.plot(seconds, [e.reward for e in curve.evaluations], ".", color=COLORS[arm], alpha=0.35, ms=5)
    rows = [np.interp(times, *zip(*curve.points, strict=True)) for curve in curves]
    _band(panel, arm, times, np.array(rows))


def _band(panel: Axes, arm: str, x: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
    panel.fill_between(x, rows.min(0), rows.max(0), color=COLORS[arm], alpha=0.15, linewidth=0)
    panel.plot(x, rows.mean(0), color=COLORS[arm], lw=2, label=WORDS[arm])
