"""The picture of `simulate_rounds.py`: what a ratio of over-provision gains and what it costs, on one page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter
from round_sweep import (
    GROUP_SIZE,
    GROUPS_PER_ENGINE,
    MAX_NUM_SEQS,
    MAX_TOKENS,
    MEDIAN_TOKENS,
    PROMPT_TOKENS,
    Cell,
    Sweep,
)

from longtail.scheduler.staleness import StaleAction

INK, MUTED, GRID = "#1f2933", "#5f6b76", "#e4e8ec"
# From light to dark with what grows, so that they are told apart in grey, too.
SIGMA_COLORS = ("#69aae0", "#2f7fc1", "#0d3b66")
LOAD_COLORS = ("#f0b87a", "#e08030", "#a8501a", "#5e2a0c")
MARK = "#c8553d"
AGE_COLORS = ("#2f7fc1", "#f2c14e", "#ee8434", "#c8553d", "#7a2e2e")
ACTION_COLORS = {"mask": "#2f7fc1", "restart": "#ee8434", "drop": "#8d99a6"}
STALENESS_LIMITS = (0, 1, 2)
BIAS_RATIOS = (1.25, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class SweepAxes:
    """The values that were swept."""

    ratios: tuple[float, ...]
    sigmas: tuple[float, ...]
    loads: tuple[int, ...]
    adaptive: float


def bound_cells() -> Iterator[Cell]:
    """The cells of the panel of staleness bounds."""
    for limit in STALENESS_LIMITS:
        for action in get_args(StaleAction):
            yield Cell(ratio=2, max_staleness=limit, action=action)
    yield Cell(ratio=2)


def draw(
    path: Path, sweep: Sweep, axes: SweepAxes, best: Mapping[str, Mapping[str, float]], validation: float | None
) -> None:
    """Write the picture; `best` is `best_ratio_by_sigma`."""
    style: Any = {
        "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
        "svg.hashsalt": "longtail",
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(16, 9.4), dpi=120, facecolor="white")
        grid = figure.add_gridspec(2, 4, left=0.04, right=0.985, top=0.795, bottom=0.15, hspace=0.5, wspace=0.24)
        _draw_gain(figure.add_subplot(grid[0, :2]), sweep, axes, best)
        _draw_staleness(figure.add_subplot(grid[0, 2]), sweep, axes)
        _draw_bias(figure.add_subplot(grid[0, 3]), sweep)
        _draw_idle(figure.add_subplot(grid[1, 0]), sweep, axes)
        _draw_reprefill(figure.add_subplot(grid[1, 1]), sweep, axes)
        _draw_bounds(figure.add_subplot(grid[1, 2]), sweep)
        _draw_loads(figure.add_subplot(grid[1, 3]), sweep, axes)
        _write_frame(figure, validation)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _write_frame(figure: Figure, validation: float | None) -> None:
    figure.text(0.04, 0.95, "How many groups to start for each one that a round needs?", size=18, weight="bold")
    figure.text(
        0.04, 0.884,
        "A round needs N complete groups of answers to one prompt each. It starts ratio x N, is cut when the N-th is"
        " complete, and carries the others, with their tokens, into the next round.\nAt ratio 1 (synchronous) it waits"
        " for its slowest answer. More groups keep the engines busy; but then some tokens were sampled by older"
        " weights, and the first rounds get short answers.",
        size=10.5, color=MUTED, linespacing=1.5,
    )  # fmt: skip
    checked = (
        "Not validated against a real engine."
        if validation is None
        else f"For a measured run of a real engine, the simulation gives {validation:.2f} times its tokens per second."
    )
    capped = math.erfc(math.log(MAX_TOKENS / MEDIAN_TOKENS) / (1.5 * math.sqrt(2))) / 2
    figure.text(
        0.04, 0.015,
        f"Simulated; rollout time only, after the first 8 rounds. 8 engines with {MAX_NUM_SEQS} slots, N ="
        f" {GROUPS_PER_ENGINE} groups of {GROUP_SIZE} per engine, prompts of {PROMPT_TOKENS:,} tokens. Answers have"
        f" lognormal lengths, median {MEDIAN_TOKENS:,}, cut off at {MAX_TOKENS:,}.\nsigma: spread of the logarithm of"
        f" their length; at 1.5, {1 - (1 - capped) ** GROUP_SIZE:.0%} of all groups hold one that is cut off, so"
        " that most groups wait equally long. KV fresh: carried groups are prefilled again under the new weights."
        " KV stale: their old KV is kept.\nThe step-time model is a data sheet's (a 7.6 B model, one H100 an engine)"
        f" unless one is given. {checked}",
        size=8.8, color=MUTED, linespacing=1.5,
    )  # fmt: skip


def _head(panel: Axes, title: str, subtitle: str) -> None:
    panel.set_title(f"{title}\n", loc="left", size=11.5, weight="bold")
    panel.text(0, 1.03, subtitle, transform=panel.transAxes, size=8.6, color=MUTED)


def _ratio_axis(panel: Axes, axes: SweepAxes) -> None:
    panel.set_xlabel("over-provision ratio: groups in flight / N")
    ticks = [ratio for ratio in axes.ratios if ratio * 2 % 1 == 0]
    panel.set_xticks(ticks, [f"{ratio:g}" for ratio in ticks])


def _gain_axis(panel: Axes) -> None:
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    panel.axhline(1, color=MUTED, lw=1)


def _line(panel: Axes, sweep: Sweep, cells: list[Cell], color: str, dashes: str = "-") -> list[dict[str, Any]]:
    """Gain over ratio; hollow where running members' KV is more than the pool."""
    figures = [sweep(cell) for cell in cells]
    x, y = [cell.ratio for cell in cells], [figure["gain"] for figure in figures]
    panel.plot(x, y, dashes, color=color, lw=1.8)
    for x_value, y_value, figure in zip(x, y, figures, strict=True):
        face = color if figure["peak_kv_usage"] <= 1 else "white"
        panel.plot(x_value, y_value, "o", color=color, mfc=face, ms=5, zorder=3)
    return figures


def _label_ends(panel: Axes, x: float, ends: list[tuple[float, str, str]]) -> None:
    """Names of lines right of their ends `(y, name, color)`, moved up where they would touch."""
    low, high = panel.get_ylim()
    last = low
    for y, name, color in sorted(ends):
        last = max(y, last + (high - low) / 14)
        panel.text(x, last, name, color=color, size=9, va="center")


def _draw_gain(panel: Axes, sweep: Sweep, axes: SweepAxes, best: Mapping[str, Mapping[str, float]]) -> None:
    _head(panel, "Gain in speed", "accepted tokens per second, compared with synchronous rounds")
    ends = []
    for kv, dashes in (("fresh", "-"), ("stale", "--")):
        for sigma, color in zip(axes.sigmas, SIGMA_COLORS, strict=True):
            cells = [Cell(ratio=ratio, sigma=sigma, kv=kv) for ratio in axes.ratios]
            gains = [figures["gain"] for figures in _line(panel, sweep, cells, color, dashes)]
            ends.append((gains[-1], f"sigma {sigma:g}, KV {kv}", color))
            ratio = best[kv][f"{sigma:g}"]
            panel.plot(ratio, gains[axes.ratios.index(ratio)], "o", ms=12, mfc="none", mec=color, mew=1.3)
            adaptive = sweep(Cell(adaptive=axes.adaptive, sigma=sigma, kv=kv))
            if adaptive["started_ratio"] < max(axes.ratios) - 0.2:
                panel.plot(adaptive["started_ratio"], adaptive["gain"], "*", ms=13, color=MARK, zorder=4)
    _gain_axis(panel)
    _ratio_axis(panel, axes)
    panel.set_xlim(0.9, 4.75)
    panel.set_ylim(top=1.12 * panel.get_ylim()[1])
    _label_ends(panel, 4.1, ends)
    marks = [
        Line2D([], [], color=MUTED, ls="", marker="o", ms=11, mfc="none", label="smallest ratio within 2% of the best"),
        Line2D([], [], color=MUTED, ls="", marker="o", mfc="white", label="KV pool too small: true gain is lower"),
        Line2D([], [], color=MARK, ls="", marker="*", ms=11, label="where adaptive over-provision settles below 4"),
    ]  # fmt: skip
    panel.legend(handles=marks, fontsize=8.5, loc="upper left", framealpha=0.9, edgecolor="none", labelspacing=0.7)


def _draw_staleness(panel: Axes, sweep: Sweep, axes: SweepAxes) -> None:
    _head(panel, "Price: older tokens", "accepted tokens by weight updates since sampled; sigma 1")
    for index, ratio in enumerate(axes.ratios):
        shares = sweep(Cell(ratio=ratio))["staleness_share"]
        oldest = len(AGE_COLORS) - 1
        heights = [shares.get(age, 0.0) for age in range(oldest)]
        heights.append(1 - sum(heights))
        bottom = 0.0
        for age, height in enumerate(heights):
            panel.bar(index, height, 0.78, bottom, color=AGE_COLORS[age])
            if height > 0.06:
                name = f"{age}+" if age == oldest else str(age)
                panel.text(index, bottom + height / 2, name, ha="center", va="center", size=8.5,
                           color=INK if age in (1, 2) else "white")  # fmt: skip
            bottom += height
    panel.set_xticks(range(len(axes.ratios)), [f"{ratio:g}" for ratio in axes.ratios])
    panel.set_xlabel("over-provision ratio (0: sampled by the newest weights)")
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.set_ylim(0, 1)
    panel.grid(axis="x", visible=False)


def _draw_bias(panel: Axes, sweep: Sweep) -> None:
    _head(
        panel,
        "Price: short answers first",
        "mean length, accepted against all answers; sigma 1",
    )
    for ratio, color in zip(BIAS_RATIOS, SIGMA_COLORS, strict=True):
        biases = sweep(Cell(ratio=ratio))["length_excess_by_round"]
        panel.plot(range(1, len(biases) + 1), biases, "o-", color=color, ms=4, lw=1.8, label=f"ratio {ratio:g}")
    panel.axhline(0, color=MUTED, lw=1)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.0%}" if value else "0"))
    panel.set_xlabel("round since the start")
    panel.set_xticks(range(1, 13))
    panel.legend(fontsize=8.5, loc="lower right", edgecolor="none")


def _draw_idle(panel: Axes, sweep: Sweep, axes: SweepAxes) -> None:
    _head(panel, "Where the gain comes from", "share of the batch slots idle; KV fresh")
    for sigma, color in zip(axes.sigmas, SIGMA_COLORS, strict=True):
        idle = [sweep(Cell(ratio=ratio, sigma=sigma))["idle_share"] for ratio in axes.ratios]
        panel.plot(axes.ratios, idle, "o-", color=color, ms=5, lw=1.8, label=f"sigma {sigma:g}")
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    panel.set_ylim(0, 1)
    _ratio_axis(panel, axes)
    panel.legend(fontsize=8.5, edgecolor="none")


def _draw_reprefill(panel: Axes, sweep: Sweep, axes: SweepAxes) -> None:
    _head(panel, "Where it goes again: KV fresh", "tokens prefilled again, per accepted token")
    for sigma, color in zip(axes.sigmas, SIGMA_COLORS, strict=True):
        tokens = [sweep(Cell(ratio=ratio, sigma=sigma))["reprefilled_per_token"] for ratio in axes.ratios]
        panel.plot(axes.ratios, tokens, "o-", color=color, ms=5, lw=1.8, label=f"sigma {sigma:g}")
    panel.set_ylim(bottom=0)
    _ratio_axis(panel, axes)
    panel.legend(fontsize=8.5, edgecolor="none")


def _draw_bounds(panel: Axes, sweep: Sweep) -> None:
    _head(panel, "What a bound on staleness leaves", "gain in tokens trained on; ratio 2, sigma 1, KV fresh")
    actions = get_args(StaleAction)
    for group, limit in enumerate(STALENESS_LIMITS):
        for index, action in enumerate(actions):
            figures = sweep(Cell(ratio=2, max_staleness=limit, action=action))
            x, height = group + (index - 1) * 0.28, figures["trained_gain"]
            panel.bar(x, height, 0.26, color=ACTION_COLORS[action], label=None if group else action)
            bias = round(100 * figures["length_excess"])
            panel.text(x, 0.05, f"{bias:+d}%" if bias else "0%", ha="center", size=8, rotation=90, color="white")
    unbounded = sweep(Cell(ratio=2))["trained_gain"]
    panel.bar(len(STALENESS_LIMITS), unbounded, 0.5, color=INK)
    panel.set_xticks(
        range(len(STALENESS_LIMITS) + 1), [*(f"at most {limit}" for limit in STALENESS_LIMITS), "no bound"]
    )
    panel.set_xlabel("staleness; in the bars: length bias that never goes")
    panel.grid(axis="x", visible=False)
    _gain_axis(panel)
    panel.set_ylim(0, unbounded * 1.3)
    panel.legend(title="what is too old is:", fontsize=8, title_fontsize=8, ncols=3, loc="upper left", edgecolor="none",
                 handlelength=1, columnspacing=1)  # fmt: skip


def _draw_loads(panel: Axes, sweep: Sweep, axes: SweepAxes) -> None:
    _head(panel, "Full engines gain less", "accepted tokens per second, by N; sigma 1, KV fresh")
    for load, color in zip(axes.loads, LOAD_COLORS, strict=True):
        _line(panel, sweep, [Cell(ratio=ratio, groups_per_engine=load) for ratio in axes.ratios], color)
    panel.set_xlim(0.85, 4.15)
    handles = [
        Line2D([], [], color=color, lw=2.5, label=f"{load} groups ({load * GROUP_SIZE / MAX_NUM_SEQS:.0%} of slots)")
        for load, color in zip(axes.loads, LOAD_COLORS, strict=True)
    ]
    panel.legend(
        handles=handles, fontsize=8, title="N per engine", title_fontsize=8, edgecolor="none", loc="upper left"
    )
    panel.set_ylim(top=panel.get_ylim()[1] * 1.25)
    _gain_axis(panel)
    _ratio_axis(panel, axes)
