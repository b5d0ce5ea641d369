"""Axes of a chart: round ticks, their labels, and where a value lies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from job.report.markup import Html, element

WIDTH, HEIGHT = 360, 230
"""Of a chart, in pixels of its own: on a phone a letter is as large as in the text beside it."""
LEFT, RIGHT, TOP, BOTTOM = 50, 348, 26, 192


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` between the pixels `start` and `end`, with ticks at round values."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    @staticmethod
    def across(values: Iterable[float], start: float, end: float, ticks: int = 5) -> Axis:
        """Return an axis from the tick below the least value to the one above the greatest."""
        values = list(values)
        low, high = min(values), max(values)
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
            low, high = low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
        step = _round_step((high - low) / ticks)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        marks = tuple(round(number * step, 12) for number in range(first, last + 1))
        return Axis(marks[0], marks[-1], start, end, marks)

    @staticmethod
    def between(low: float, high: float, start: float, end: float) -> Axis:
        """Return an axis that ends exactly at two values."""
        inner = Axis.across([low, high], start, end)
        ticks = tuple(tick for tick in inner.ticks if low <= tick <= high)
        return Axis(low, high, start, end, ticks)

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + share * (self.end - self.start), 1)


def _round_step(rough: float) -> float:
    """Return the least of 1, 2, 5 × 10^n that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def format_tick(value: float) -> str:
    """Return a number as short as an axis needs it: 0.85, 12k, 3M, 5e-5."""
    size = abs(value)
    if size >= 1e4:
        return f"{value / 1e6:g}M" if size >= 1e6 else f"{value / 1e3:g}k"
    if 0 < size < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:.6g}"


def draw_axes(x: Axis, y: Axis, x_name: str, y_name: str) -> Html:
    """Return both axes: lines at the ticks of y, numbers, and names (that of y above it)."""
    parts = [
        element("line", x1=x.start, x2=x.end, y1=y.place(tick), y2=y.place(tick), class_="rule") for tick in y.ticks
    ]
    parts += [
        element("text", format_tick(tick), x=x.start - 6, y=y.place(tick) + 4, text_anchor="end") for tick in y.ticks
    ]
    parts += [
        element("text", format_tick(tick), x=x.place(tick), y=y.start + 16, text_anchor="middle") for tick in x.ticks
    ]
    parts += [
        element("text", y_name, x=2, y=12),
        element("text", x_name, x=(x.start + x.end) / 2, y=y.start + 33, text_anchor="middle"),
    ]
    return Html("".join(parts))


def draw_upright(x: float, y1: float, y2: float, kind: str, *content: object) -> Html:
    """Return a line from one height to another; `kind` is its class in `style.py`."""
    return element("line", *content, x1=x, x2=x, y1=y1, y2=y2, class_=kind)


def draw_frame(name: str, *parts: object, height: float = HEIGHT, width: float = WIDTH) -> Html:
    """Return an SVG picture whose name a screen reader says."""
    box = f"0 0 {width:g} {height:g}"
    return element(
        "svg", element("title", name), *parts, viewBox=box, role="img", width=f"{width:g}", height=f"{height:g}"
    )
