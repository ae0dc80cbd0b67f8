"""The distribution of output lengths, as one `<svg>` element.

Trajectories that ended by themselves stand below, stopped ones (whose lengths are lower bounds) hatched on top
of them, in bars of one width. Each bar says its numbers in a `<title>`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from longtail.engine.cli.report_svg import CHAR_PX, LEFT, WIDTH, Axis, nice_step, rect, svg, text, x_ticks, y_grid
from longtail.engine.cli.round_summary import Lengths, Quantile, RoundSummary

_MIN_BINS, _NUM_BINS = 12, 48
_HEIGHT_PX = 210
_QUANTILES = ((0.5, "median"), (0.9, "p90"), (0.99, "p99"), (1.0, "max"))


def bin_width(longest: int, num_bins: int = _NUM_BINS) -> int:
    """Tokens of one histogram bar, so that about `num_bins` bars reach `longest`."""
    return max(1, int(nice_step((longest + 1) / num_bins)))


def histogram_svg(summary: RoundSummary) -> str:
    """Output lengths in bars of equal width, ended below and stopped on top, with the quantiles above."""
    lengths = summary.lengths
    everything = lengths.all
    if not everything:
        return ""
    # As many bars as the number of trajectories can fill, up to what the eye takes.
    width = bin_width(everything[-1], min(_NUM_BINS, max(_MIN_BINS, round(3 * math.sqrt(len(everything))))))
    num_bins = everything[-1] // width + 1
    counts = [(_count(lengths.ended, i, width), _count(lengths.stopped, i, width)) for i in range(num_bins)]
    labels = _quantile_labels(lengths)
    x = Axis(num_bins * width, LEFT, WIDTH - 12 - CHAR_PX * len(labels[-1][1]))
    marks = _place_marks(labels, x)
    num_levels = 1 + max(level for _, level, _ in marks)
    top = 18 + 17 * num_levels
    bottom = top + _HEIGHT_PX
    y = Axis(1.08 * max(a + b for a, b in counts), bottom, top)
    parts = [y_grid(y, y.ticks(4, whole=True), x.end_px), x_ticks(x, bottom, x.ticks(10, whole=True))]
    bar_px = x(width) - x(0)
    gap = 1.0 if bar_px > 5 else 0.25
    for i, (ended, stopped) in enumerate(counts):
        tokens = str(i) if width == 1 else f"{i * width:,} to {(i + 1) * width - 1:,}"
        base = float(bottom)
        for number, kind, words in ((ended, "kept", "ended by themselves"), (stopped, "cut-hatch", "stopped")):
            if number:
                height = max(2.0, bottom - y(number))
                base -= height
                title = f"{tokens} tokens: {number:,} {words}"
                parts.append(rect(kind, x(i * width) + gap / 2, base, bar_px - gap, height, title))
    for x_px, level, label in marks:
        y_label = top - 8 - 17 * level
        parts.append(f'<line class="mark" x1="{x_px:.1f}" x2="{x_px:.1f}" y1="{y_label - 9}" y2="{bottom}"/>')
        parts.append(text(x_px + 4, y_label, label, "mark-label"))
    parts.append(text((x.start_px + x.end_px) / 2, bottom + 38, "output tokens of one trajectory", "", "middle"))
    parts.append(text(16, (top + bottom) / 2, "trajectories", "", "middle", turned=True))
    return svg(bottom + 46, "Distribution of output lengths", parts)


def _count(ordered: Sequence[int], i: int, width: int) -> int:
    return bisect_right(ordered, (i + 1) * width - 1) - bisect_right(ordered, i * width - 1)


def _quantile_labels(lengths: Lengths) -> list[tuple[int, str]]:
    """`(length, words)` ascending; quantiles of one value share a label."""
    found: dict[int, tuple[list[str], Quantile]] = {}
    for q, name in _QUANTILES:
        if (quantile := lengths.quantile(q)) is not None:
            found.setdefault(quantile.value, ([], quantile))[0].append(name)
    return [(value, f"{', '.join(names)} {quantile}") for value, (names, quantile) in found.items()]


def _place_marks(labels: Sequence[tuple[int, str]], x: Axis) -> list[tuple[float, int, str]]:
    """Put each label right of its line, one level above every line to the right that it would cover."""
    marks: list[tuple[float, int, str]] = []
    for value, label in reversed(labels):
        x_px = x(value)
        end = x_px + 10 + len(label) * CHAR_PX
        marks.append((x_px, 1 + max((level for other, level, _ in marks if other < end), default=-1), label))
    return marks
