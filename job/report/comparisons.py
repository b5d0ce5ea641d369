"""Charts that put names side by side, as SVG: intervals, bars, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from job.report.axes import Axis, draw_frame, draw_upright, format_tick
from job.report.markup import Html, element, shorten

_LEFT, _RIGHT, _ROW = 122, 346, 26
_NAME_COLUMNS = 17


@dataclass(frozen=True)
class Bar:
    """A name, a value and its words; of an interval, its ends. `colour` is a, b or c."""

    name: str
    value: float
    text: str
    colour: str
    low: float | None = None
    high: float | None = None


def draw_intervals(name: str, rows: Sequence[Bar], axis_name: str) -> Html:
    """Return a dot and whiskers for each row."""
    ends = [end for row in rows for end in (row.low, row.value, row.high) if end is not None]
    x, bottom = Axis.across(ends, _LEFT + 6, _RIGHT - 10, ticks=4), 12 + _ROW * len(rows)
    parts: list[object] = []
    for tick in x.ticks:
        parts.append(draw_upright(x.place(tick), 6, bottom, "rule"))
        parts.append(element("text", format_tick(tick), x=x.place(tick), y=bottom + 16, text_anchor="middle"))
    for number, row in enumerate(rows):
        middle = 6 + _ROW * (number + 0.5)
        parts.append(_draw_name(row.name, middle))
        if row.low is not None and row.high is not None:
            left, right = x.place(row.low), x.place(row.high)
            parts.append(element("line", x1=left, x2=right, y1=middle, y2=middle, class_=f"line-{row.colour}"))
            parts += [draw_upright(end, middle - 4, middle + 4, f"line-{row.colour}") for end in (left, right)]
        tip = element("title", f"{row.name}: {row.text}")
        parts.append(element("circle", tip, cx=x.place(row.value), cy=middle, r=4, class_=f"fill-{row.colour}"))
    parts.append(element("text", axis_name, x=(x.start + x.end) / 2, y=bottom + 33, text_anchor="middle"))
    return draw_frame(name, *parts, height=bottom + 40)


def draw_long_names(name: str, bars: Sequence[Bar]) -> Html:
    """Return bars from zero on, each below its name, which has the whole width."""
    x = Axis.between(0, max([bar.value for bar in bars], default=1), 2, _RIGHT - 84)
    parts: list[object] = []
    for number, bar in enumerate(bars):
        top, end = 32 * number, max(x.place(bar.value), 3)
        parts.append(element("text", element("title", bar.name), shorten(bar.name, 50), x=2, y=top + 12, class_="ink"))
        parts.append(element("rect", x=2, y=top + 17, width=round(end - 2, 1), height=8, class_=f"fill-{bar.colour}"))
        parts.append(element("text", bar.text, x=end + 5, y=top + 25))
    return draw_frame(name, *parts, height=max(32 * len(bars), 1))


def draw_bars(name: str, groups: Sequence[tuple[str, Sequence[Bar]]]) -> Html:
    """Return groups of bars from zero on, each group with a heading and a scale of its own."""
    parts: list[object] = []
    top = 0.0
    for heading, bars in groups:
        parts.append(element("text", heading, x=2, y=top + 16, class_="ink"))
        x = Axis.between(0, max(max(bar.value for bar in bars), 1e-9), _LEFT, _RIGHT - 84)
        top += 24
        for bar in bars:
            end = max(x.place(bar.value), _LEFT + 1)
            parts.append(_draw_name(bar.name, top + 9))
            parts.append(
                element("rect", x=_LEFT, y=top + 2, width=round(end - _LEFT, 1), height=14, class_=f"fill-{bar.colour}")
            )
            parts.append(element("text", bar.text, x=end + 5, y=top + 13, class_="ink"))
            top += 22
        top += 8
    return draw_frame(name, *parts, height=top)


def _draw_name(name: str, middle: float) -> Html:
    whole = element("title", name)
    return element(
        "text", whole, shorten(name, _NAME_COLUMNS), x=_LEFT - 8, y=middle + 4, text_anchor="end", class_="ink"
    )


def draw_confusion(name: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Html:
    """Return a matrix with a row for each true label and a column for each that was said.

    The darker a cell, the larger its share of the row; counts are written where they have room.
    """
    few = len(labels) <= 8
    left, columns = (104, 14) if few else (112, 15)
    turns = len(labels) > 3
    cell = min(((318 if turns else 352) - left) / len(labels), 84)  # the last name that is turned needs room, too
    height, head = min(cell, 56), 88 if turns else 24
    parts: list[object] = [element("text", "true ↓ said →", x=left - 6, y=head - 6, text_anchor="end")]
    for number, label in enumerate(labels):
        middle_x, middle_y = left + cell * (number + 0.5), head + height * (number + 0.5)
        turned = {} if not turns else {"transform": f"rotate(-60 {middle_x:.1f} {head - 6})"}
        anchor = "start" if turned else "middle"
        place = {"x": round(middle_x, 1), "y": head - 6, "text_anchor": anchor}
        parts.append(element("text", element("title", label), shorten(label, 12), **place, class_="ink", **turned))
        place = {"x": left - 6, "y": round(middle_y + 4, 1), "text_anchor": "end"}
        parts.append(element("text", element("title", label), shorten(label, columns), **place, class_="ink"))
        parts += _draw_matrix_row(labels, counts, number, (left, head, cell, height))
    return draw_frame(name, *parts, height=head + height * len(labels) + 4)


def _draw_matrix_row(
    labels: Sequence[str], counts: Sequence[Sequence[int]], row: int, box: tuple[float, float, float, float]
) -> list[object]:
    left, top, width, height = box
    total = max(sum(counts[row]), 1)
    parts: list[object] = []
    for column, count in enumerate(counts[row]):
        share = count / total
        tip = element("title", f"true {labels[row]}, said {labels[column]}: {count} ({share:.1%} of the row)")
        place = {"x": round(left + width * column, 1), "y": round(top + height * row, 1)}
        size = {"width": round(width - 1, 1), "height": round(height - 1, 1)}
        parts.append(element("rect", **place, **size, class_="cell"))
        parts.append(element("rect", tip, **place, **size, class_="fill-a", fill_opacity=round(share, 3)))
        if count and width >= 22:
            x, y = round(place["x"] + width / 2, 1), round(place["y"] + height / 2, 1)
            colour = "paper" if share > 0.5 else "ink"
            parts.append(
                element("text", count, x=x, y=y + (0 if height > 40 else 4), text_anchor="middle", class_=colour)
            )
            if height > 40:
                parts.append(element("text", f"{share:.0%}", x=x, y=y + 15, text_anchor="middle", class_=colour))
    return parts
