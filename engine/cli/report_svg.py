"""The few SVG shapes and the axis that the pictures of a report are made of.

Shapes are strings with a CSS class instead of a colour; `report_template.html` gives the classes their colours,
so that a picture follows the reader's light or dark scheme and prints. Every text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 960
LEFT, RIGHT = 64, 20
CHAR_PX = 6.6  # about the width of a character at a picture's 12 px, for placing labels


@dataclass(frozen=True)
class Axis:
    """A linear map of `[0, high]` to pixels, with round ticks."""

    high: float
    start_px: float
    end_px: float

    def __call__(self, value: float) -> float:
        return self.start_px + (self.end_px - self.start_px) * min(max(value, 0.0), self.high) / self.high

    def ticks(self, about: int, whole: bool = False) -> list[float]:
        step = nice_step(self.high / about)
        step = max(1.0, step) if whole else step
        return [i * step for i in range(int(self.high / step + 1e-9) + 1)]


def nice_step(at_least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `at_least`."""
    power = 10.0 ** math.floor(math.log10(at_least)) if at_least > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= at_least * (1 - 1e-9))


def svg(height: float, label: str, parts: Sequence[str]) -> str:
    """The element that holds `parts`, `WIDTH` units wide."""
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def rect(kind: str, x: float, y: float, width: float, height: float, title: str = "") -> str:
    """A rectangle of class `kind`; `title` shows when the reader points at it."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.2f}" width="{max(0.0, width):.1f}" '
        f'height="{max(0.0, height):.2f}">{inner}</rect>'
    )


def text(x: float, y: float, words: str, kind: str, anchor: str = "start", turned: bool = False) -> str:
    """One line of escaped text; `turned` reads from bottom to top."""
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(words)}</text>'


def y_grid(y: Axis, ticks: Sequence[float], end_px: float) -> str:
    """Horizontal lines and their labels."""
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{end_px:.1f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        + text(LEFT - 8, y(tick) + 4, f"{tick:,.0f}", "", "end")
        for tick in ticks
    )


def x_ticks(x: Axis, bottom: float, ticks: Sequence[float], labels: bool = True, top: float | None = None) -> str:
    """The x axis at `bottom`, its labels, and vertical lines up to `top`."""
    parts = [f'<line class="axis" x1="{LEFT}" x2="{x.end_px:.1f}" y1="{bottom}" y2="{bottom}"/>']
    for tick in ticks:
        x_px = x(tick)
        if top is not None:
            parts.append(f'<line class="grid" x1="{x_px:.1f}" x2="{x_px:.1f}" y1="{top}" y2="{bottom}"/>')
        if labels:
            parts.append(text(x_px, bottom + 17, f"{tick:,.6g}" if tick % 1 else f"{tick:,.0f}", "", "middle"))
    return "".join(parts)
