"""The curves of a training run as `<svg>` elements: lines over the steps, and stacked bars.

Colours are CSS classes of the report's template, as in `engine.cli.report_svg`, whose shapes these are made of. A point
or bar says its value when the reader points at it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from longtail.engine.cli.report_svg import LEFT, RIGHT, WIDTH, Axis, rect, svg, text, x_ticks

_HEIGHT_PX, _TOP_PX = 190.0, 18.0
_MAX_DOTS = 80


@dataclass(frozen=True)
class Line:
    """Values over steps; `kind` is a class of the template: `curve-a`, `curve-b`, and `dots` with it to mark points."""

    words: str
    kind: str
    points: Sequence[tuple[int, float]]
    has_dots: bool = False


@dataclass(frozen=True)
class Bars:
    """One stacked bar a step: `parts` are words and class of each layer, bottom first, `heights` those of each step."""

    parts: Sequence[tuple[str, str]]
    steps: Sequence[int]
    heights: Sequence[Sequence[float]] = field(default=())


def line_chart(lines: Sequence[Line], label: str, shown: Callable[[float], str], high: float | None = None) -> str:
    """Lines from 0 to `high`, by default the largest value; `shown` words a value."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    last = max(step for line in lines for step, _ in line.points)
    top = max(value for line in lines for _, value in line.points) if high is None else high
    x, y = _axes(last, top)
    parts = [_grid(x, y, shown)]
    for line in lines:
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in line.points)
        parts.append(f'<path class="curve {line.kind}" d="M{path}"/>')
        for step, value in line.points:
            radius = 3.4 if line.has_dots and len(line.points) <= _MAX_DOTS else 0.0
            title = escape(f"step {step}: {line.words} {shown(value)}")
            parts.append(
                f'<circle class="dot {line.kind}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="{radius}"/>'
                f'<circle class="target" cx="{x(step):.1f}" cy="{y(value):.1f}" r="7"><title>{title}</title></circle>'
            )
    return _finished(parts, label)


def bar_chart(bars: Bars, label: str, shown: Callable[[float], str], high: float | None = None) -> str:
    """Stacked bars from 0 to `high`, by default the highest bar."""
    if not bars.steps:
        return ""
    top = max(sum(heights) for heights in bars.heights) if high is None else high
    x, y = _axes(max(bars.steps), top)
    parts = [_grid(x, y, shown)]
    width = max(1.0, 0.8 * (x(1) - x(0)))
    for step, heights in zip(bars.steps, bars.heights, strict=True):
        below = 0.0
        for (words, kind), height in zip(bars.parts, heights, strict=True):
            if height > 0:
                y_px = y(below + height)
                title = f"step {step}: {words} {shown(height)}"
                parts.append(rect(kind, x(step) - width / 2, y_px, width, y(below) - y_px, title))
            below += height
    return _finished(parts, label)


def legend(keys: Sequence[tuple[str, str]]) -> str:
    """Words and class of each line (`curve-...`) or layer."""
    items = []
    for words, kind in keys:
        mark = (
            f'<path class="curve {kind}" d="M1 6H21"/>'
            if kind.startswith("curve")
            else f'<rect class="{kind}" x="0.5" y="0.5" width="21" height="11"/>'
        )
        items.append(f'<li><svg viewBox="0 0 22 12" aria-hidden="true">{mark}</svg>{escape(words)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _axes(last_step: int, high: float) -> tuple[Axis, Axis]:
    bottom = _TOP_PX + _HEIGHT_PX
    return Axis(last_step + 0.6, LEFT, WIDTH - RIGHT), Axis(1.04 * (high or 1.0), bottom, _TOP_PX)


def _grid(x: Axis, y: Axis, shown: Callable[[float], str]) -> str:
    bottom = _TOP_PX + _HEIGHT_PX
    lines = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{x.end_px:.1f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        + text(LEFT - 8, y(tick) + 4, shown(tick), "", "end")
        for tick in y.ticks(6)
    )
    return lines + x_ticks(x, bottom, x.ticks(12, whole=True))


def _finished(parts: Sequence[str], label: str) -> str:
    bottom = _TOP_PX + _HEIGHT_PX
    under = text((LEFT + WIDTH - RIGHT) / 2, bottom + 36, "step", "", "middle")
    return svg(bottom + 42, label, [*parts, under])
