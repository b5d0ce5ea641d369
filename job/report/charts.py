"""Charts with two axes, as SVG: curves over steps, histograms, reliability. Colours are classes of `style.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from job.report.axes import BOTTOM, LEFT, RIGHT, TOP, Axis, draw_axes, draw_frame, draw_upright
from job.report.markup import Html, element
from job.tasks.intervals import wilson_interval

_MOST_POINTS = 240
"""A curve has no more; of what lies between, the least and the greatest value are kept."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """(step, value) points under a name; `colour` is a, b or c."""

    name: str
    points: Sequence[Point]
    colour: str = "a"


def draw_curves(name: str, series: Sequence[Series], steps: int, marks: Sequence[float] = ()) -> Html | None:
    """Return lines over so many steps, None where there is no point; at `marks` an attempt went on."""
    series = [Series(s.name, list(_thin([p for p in s.points if math.isfinite(p[1])])), s.colour) for s in series]
    series = [each for each in series if each.points]
    if not series:
        return None
    x = Axis.between(0, max(steps, 1), LEFT, RIGHT)
    y = Axis.across((value for each in series for _, value in each.points), BOTTOM, TOP)
    parts = [draw_axes(x, y, "step", "" if len(series) > 1 else series[0].name)]
    for step in marks:
        parts.append(draw_upright(x.place(step), TOP, BOTTOM, "mark", element("title", f"resumed from step {step:g}")))
    for each in series:
        path = " ".join(f"{x.place(step)},{y.place(value)}" for step, value in each.points)
        parts.append(element("polyline", points=path, class_=f"line-{each.colour}"))
        for step, value in each.points if len(each.points) <= 40 else ():
            tip, colour = element("title", f"step {step:g}: {value:.5g}"), f"fill-{each.colour}"
            parts.append(element("circle", tip, cx=x.place(step), cy=y.place(value), r=2.5, class_=colour))
    return draw_frame(name, *parts, _draw_legend(series) if len(series) > 1 else "")


def _thin(points: list[Point]) -> Iterator[Point]:
    """Yield the points, or of many the extremes of each of as many stretches as may be shown."""
    if len(points) <= _MOST_POINTS:
        yield from points
        return
    size = math.ceil(len(points) / (_MOST_POINTS // 2))
    for start in range(0, len(points), size):
        part = points[start : start + size]
        yield from sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})


def _draw_legend(series: Sequence[Series]) -> Html:
    parts, left = [], 2.0
    for each in series:
        parts.append(element("rect", x=left, y=5, width=12, height=4, class_=f"fill-{each.colour}"))
        parts.append(element("text", each.name, x=left + 17, y=12))
        left += 30 + 7 * len(each.name)
    return Html("".join(parts))


def draw_lengths(name: str, lengths: dict[str, Any]) -> Html:
    """Return the histogram of tokens per row (`evaluate/analysis.py`), with a mark at the length where rows are cut."""
    width, counts = lengths["width"], lengths["counts"]
    x = Axis.between(0, max(width * len(counts), 1), LEFT, RIGHT)
    y = Axis.across([0, max(counts)], BOTTOM, TOP)
    parts = [draw_axes(x, y, "tokens of a train row", "rows")]
    for number, count in enumerate(counts):
        left, right = x.place(number * width), x.place((number + 1) * width)
        tip = element("title", f"{number * width + 1} to {(number + 1) * width} tokens: {count} rows")
        size = {"width": max(round(right - left - 1, 1), 0.5), "height": round(BOTTOM - y.place(count), 1)}
        parts.append(element("rect", tip, x=left + 0.5, y=y.place(count), **size, class_="fill-a"))
    if lengths["cut"]:
        parts.append(draw_upright(RIGHT, TOP, BOTTOM, "mark"))
    return draw_frame(name, *parts)


def draw_reliability(name: str, calibration: dict[str, Any]) -> Html:
    """Return how often answers of a confidence are right, with 95 % intervals; on the dashed line it is calibrated."""
    x, y = Axis.between(0, 1, LEFT, RIGHT), Axis.between(0, 1, BOTTOM, TOP)
    parts = [
        draw_axes(x, y, "confidence", "share that is right"),
        element("line", x1=x.place(0), y1=y.place(0), x2=x.place(1), y2=y.place(1), class_="mark"),
    ]
    for each in calibration["bins"]:
        low, high = wilson_interval(each["accuracy"], each["n"])
        place, radius = x.place(each["confidence"]), round(2.5 + 5 * math.sqrt(each["n"] / calibration["n"]), 1)
        tip = f"{each['n']} rows, confidence {each['confidence']:.3f}, right {each['accuracy']:.3f}"
        parts.append(draw_upright(place, y.place(low), y.place(high), "line-a"))
        parts.append(
            element("circle", element("title", tip), cx=place, cy=y.place(each["accuracy"]), r=radius, class_="fill-a")
        )
    return draw_frame(name, *parts)
