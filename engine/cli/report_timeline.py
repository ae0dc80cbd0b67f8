"""The timeline of a round, as one `<svg>` element: a bar for each trajectory, the cut, and how full the batch was.

`Timeline` decides which rows are drawn and in what order, `timeline_svg` draws them. A bar says its details in a
`<title>`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

from longtail.engine.cli.report_svg import CHAR_PX, LEFT, RIGHT, WIDTH, Axis, rect, svg, text, x_ticks, y_grid
from longtail.engine.cli.round_summary import (
    RoundSummary,
    end_words,
    has_started,
    outcome_of,
)
from longtail.engine.trajectory import Group, Trajectory

_Item = TypeVar("_Item")

#: A timeline draws at most so many bars; above that, groups are left out evenly.
MAX_BARS = 400
_MAX_ROWS_PX, _MAX_ROW_PX = 640, 12.0
_GROUP_RANK = {"complete": 0, "failed": 1, "cut": 2}


@dataclass(frozen=True)
class Timeline:
    """The rows that a timeline shows, top to bottom."""

    rows: tuple[tuple[Group, Trajectory], ...]
    num_trajectories: int

    @classmethod
    def of(cls, groups: Sequence[Group], max_bars: int = MAX_BARS) -> Timeline:
        """Order groups by when they were over (complete, then failed, then cut) and thin them to `max_bars`."""
        ordered = sorted((group for group in groups if group.trajectories), key=_group_order)
        total = sum(len(group.trajectories) for group in ordered)
        if total > max_bars:
            ordered = _evenly(ordered, max(1, len(ordered) * max_bars // total))
        rows = [(g, t) for g in ordered for t in sorted(g.trajectories, key=_member_order)]
        return cls(tuple(_evenly(rows, max_bars)), total)


def _evenly(items: list[_Item], at_most: int) -> list[_Item]:
    if len(items) <= at_most:
        return items
    return [items[round(i * (len(items) - 1) / max(1, at_most - 1))] for i in range(at_most)]


def _fate(group: Group) -> str:
    return "complete" if group.complete else "cut" if any(t.was_cut for t in group.trajectories) else "failed"


def _group_order(group: Group) -> tuple[float, ...]:
    ends = [t.timings.finished_s for t in group.trajectories if t.timings.finished_s is not None]
    starts = [t.timings.scheduled_s for t in group.trajectories if t.timings.scheduled_s is not None]
    over = max(ends, default=math.inf)
    if (fate := _fate(group)) == "cut":  # all end at the cut, so their starts make the shape
        over = min(starts, default=math.inf)
    return (_GROUP_RANK[fate], over, min(starts, default=math.inf))


def _member_order(trajectory: Trajectory) -> tuple[float, ...]:
    times = trajectory.timings
    missing = math.inf
    return (
        not has_started(trajectory),
        missing if times.finished_s is None else times.finished_s,
        missing if times.scheduled_s is None else times.scheduled_s,
        trajectory.index,
    )


def timeline_svg(summary: RoundSummary, timeline: Timeline) -> str:
    """One bar for each trajectory over the seconds of the round, and below it how full the batch was."""
    rows = timeline.rows
    if not rows:
        return ""
    row_px = min(_MAX_ROW_PX, _MAX_ROWS_PX / len(rows))
    top = 30.0
    bottom = top + row_px * len(rows)
    x = Axis(1.02 * (summary.end_s or 1.0), LEFT, WIDTH - RIGHT)
    parts = [_bands(rows, top, row_px), x_ticks(x, bottom, x.ticks(10), labels=False, top=top)]
    for i, (group, trajectory) in enumerate(rows):
        parts.append(_bar(summary, group, trajectory, x, top + i * row_px, row_px))
    occupancy, low = _occupancy(summary, x, bottom + 44)
    parts.append(occupancy)
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, low + 38, "seconds since the round was submitted", "", "middle"))
    if summary.cut_s is not None:
        x_px = x(summary.cut_s)
        parts.append(f'<line class="cut-line" x1="{x_px:.1f}" x2="{x_px:.1f}" y1="{top - 8}" y2="{low}"/>')
        anchor = "end" if x_px > WIDTH / 2 else "start"
        parts.append(text(x_px, top - 14, f"round cut at {summary.cut_s:.1f} s", "cut-label", anchor))
    return svg(low + 46, "Timeline of the trajectories and occupancy of the batch", parts)


def _bands(rows: Sequence[tuple[Group, Trajectory]], top: float, row_px: float) -> str:
    """Every second group shaded, and on the left how far complete, failed and cut groups reach."""
    parts = []
    fates: dict[str, list[int]] = {}
    start = shade = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i][0] is not rows[start][0]:
            fates.setdefault(_fate(rows[start][0]), []).extend((start, i))
            if shade:
                parts.append(rect("band", LEFT, top + start * row_px, WIDTH - RIGHT - LEFT, (i - start) * row_px))
            start, shade = i, 1 - shade
    for fate, edges in fates.items():
        y1, y2 = top + min(edges) * row_px + 2, top + max(edges) * row_px - 2
        if y2 - y1 < 8:
            continue
        parts.append(f'<path class="bracket" d="M{LEFT - 10} {y1:.1f}h-6V{y2:.1f}h6"/>')
        label = f"{fate} groups"
        if y2 - y1 > len(label) * CHAR_PX:
            parts.append(text(LEFT - 26, (y1 + y2) / 2, label, "", "middle", turned=True))
        elif y2 - y1 > 10:
            parts.append(text(LEFT - 19, (y1 + y2) / 2 + 4, fate if len(fate) < 6 else fate[:5] + "…", "", "end"))
    return "".join(parts)


def _bar(summary: RoundSummary, group: Group, trajectory: Trajectory, x: Axis, y: float, row_px: float) -> str:
    times = trajectory.timings
    end = summary.end_s if times.finished_s is None else times.finished_s
    start = end if times.scheduled_s is None else times.scheduled_s
    outcome = outcome_of(trajectory, group)
    ran = f"ran {start:.2f} to {end:.2f} s"
    if times.scheduled_s is None:
        ran = "when it ran is not known" if has_started(trajectory) else "never started"
    tokens = len(trajectory.output_token_ids)
    bound = "" if trajectory.ended_by_itself else "at least "
    lines = (
        trajectory.trajectory_id,
        f"group {group.group_id} ({_fate(group)})",
        f"{bound}{tokens:,} tokens, {end_words(trajectory)}",
        ran,
    )
    pad = row_px * 0.12 if row_px >= 3 else 0.0
    shapes = []
    if start > times.submitted_s:
        is_thin = row_px < 4  # hairlines would run into one grey; a pale full row does not
        shapes.append(
            rect(
                "queued pale" if is_thin else "queued",
                x(times.submitted_s),
                y if is_thin else y + row_px * 0.4,
                x(start) - x(times.submitted_s),
                row_px if is_thin else row_px * 0.2,
            )
        )
    if times.scheduled_s is not None:
        shapes.append(rect(outcome, x(start), y + pad, max(1.0, x(end) - x(start)), row_px - 2 * pad))
    return f'<g class="row">{"".join(shapes)}<title>{escape(chr(10).join(lines))}</title></g>'


def _occupancy(summary: RoundSummary, x: Axis, top: float) -> tuple[str, float]:
    """The area chart from `top` down; returns it and where it ends."""
    bottom = top + 110
    occupancy = summary.occupancy
    if not occupancy.peak:
        return text(LEFT, top + 20, "no trajectory has run", ""), top + 30
    y = Axis(occupancy.peak * 1.12, bottom, top)
    first, last = x(occupancy.steps[0][0]), x(occupancy.steps[-1][0])
    peak_px = y(occupancy.peak)
    corners: list[tuple[float, float]] = []
    for second, running in occupancy.steps:
        x_px = x(second)
        if corners and x_px - corners[-1][0] < 0.5:  # too close to see: the later count stands for both
            x_px = corners.pop()[0]
        corners.append((x_px, y(running)))
    path = f"M{first:.1f} {bottom}" + "".join(f"H{x_px:.1f}V{y_px:.1f}" for x_px, y_px in corners)
    ticks = sorted(
        {tick for tick in y.ticks(3, whole=True) if occupancy.peak - tick > occupancy.peak * 0.15}
        | {float(occupancy.peak)}
    )
    parts = [
        y_grid(y, ticks, x.end_px),
        x_ticks(x, bottom, x.ticks(10), top=top),
        rect("idle", first, peak_px, last - first, bottom - peak_px, "empty places"),
        f'<path class="busy" d="{path}Z"><title>trajectories running</title></path>',
        f'<line class="peak" x1="{first:.1f}" x2="{last:.1f}" y1="{peak_px:.1f}" y2="{peak_px:.1f}"/>',
    ]
    idle = "" if occupancy.idle_share is None else f"; {occupancy.idle_share:.0%} of these places were empty"
    at_once = "one trajectory" if occupancy.peak == 1 else f"{occupancy.peak} trajectories"
    words = f"Batch: at most {at_once} at once{idle}"
    parts.append(text(LEFT, top - 10, words, "chart-title"))
    parts.append(text(16, (top + bottom) / 2, "running", "", "middle", turned=True))
    return "".join(parts), bottom
