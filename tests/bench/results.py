"""What a lane leaves: rows with a figure, its interval, a goal and whether it is met; as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from racing import Interval, Turn, compare

from job.report.axes import Axis, draw_frame
from job.report.images import format_svg, write_pictures
from job.report.markup import Html, element, shorten
from job.report.plots import Plot


@dataclass(frozen=True)
class Bench:
    """What every lane is given: the assets, a folder of its own, how many rounds, and whether it is only tried out."""

    assets: Path
    folder: Path
    rounds: int
    tiny: bool


@dataclass(frozen=True)
class Row:
    """One line of the table. A goal is a least ratio («×»), or a most in seconds or per cent.

    Where ours is not `equal` to what it stands beside in what it does, no speed reaches a goal.
    """

    against: str
    unit: str
    figure: Interval
    goal: float | None
    note: str = ""
    equal: bool = True

    @property
    def met(self) -> bool | None:
        """Tell whether the worse end of the interval reaches the goal; None where there is none."""
        if self.goal is None:
            return None
        reached = self.figure.low >= self.goal if self.unit == "×" else self.figure.high <= self.goal
        return reached and self.equal

    def to_json(self) -> dict[str, Any]:
        """Return what `bench.json` keeps of it."""
        return asdict(self) | {"figure": self.figure._asdict(), "met": self.met}

    @staticmethod
    def from_json(saved: dict[str, Any]) -> Row:
        """Return what `to_json` was made of."""
        given = {key: value for key, value in saved.items() if key != "met"}
        return Row(**given | {"figure": Interval(**saved["figure"])})


def compare_starts(against: str, turns: Mapping[str, list[Turn]], goal: float) -> Row:
    """Return how many times sooner "job" is there than the other of two, by wall clock; processor time is beside it."""
    (peer,) = turns.keys() - {"job"}
    names = (peer, "job")
    wall, cpu = (
        compare(*([getattr(turn, key) for turn in turns[name]] for name in names)) for key in ("wall_s", "cpu_s")
    )
    ours, theirs = (np.median([turn.wall_s for turn in turns[name]]) for name in ("job", peer))
    return Row(against, "×", wall, goal, f"{ours:.2f} : {theirs:.2f} s of wall clock; CPU {cpu} ×")


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| against | measured (95 %) | goal | met | beside it |", "|---|---|---|---|---|"]
    for row in rows:
        sign = "≥" if row.unit == "×" else "≤"
        goal = "–" if row.goal is None else f"{sign} {row.goal:g} {row.unit}"
        met = {True: "yes", False: "no", None: "–"}[row.met]
        lines.append(f"| {row.against} | {row.figure} {row.unit} | {goal} | {met} | {row.note} |")
    return "\n".join(lines)


_LEFT, _RIGHT, _ROW = 4, 512, 34


def draw_ratios(name: str, rows: Sequence[Row]) -> Html:
    """Return a dot and whiskers for every ratio, on a scale of powers of two, with a mark at its goal."""
    rows = [row for row in rows if row.unit == "×"]
    ends = [math.log2(max(end, 1 / 64)) for row in rows for end in (*row.figure, row.goal or 1.0)]
    first, last = math.floor(min([0.0, *ends])), math.ceil(max([1.0, *ends]))
    x = Axis(first, last, _LEFT + 14, _RIGHT - 12, tuple(range(first, last + 1)))
    bottom = _ROW * len(rows) + 4
    parts: list[object] = []
    for tick in x.ticks:
        place = x.place(tick)
        parts.append(element("line", x1=place, x2=place, y1=2, y2=bottom, class_="rule" if tick else "mark"))
        parts.append(element("text", f"{2.0**tick:g}×", x=place, y=bottom + 16, text_anchor="middle"))
    for number, row in enumerate(rows):
        parts += _draw_ratio(row, x, _ROW * number)
    return draw_frame(name, *parts, height=bottom + 24, width=_RIGHT + 8)


def _draw_ratio(row: Row, x: Axis, top: float) -> list[object]:
    middle, left, right = (x.place(math.log2(max(end, 1 / 64))) for end in row.figure)
    y, colour = top + 24, "c" if row.met is None else "b" if row.met else "a"
    parts: list[object] = [
        element("text", shorten(row.against, 72), x=_LEFT, y=top + 13, class_="ink"),
        element("line", x1=left, x2=right, y1=y, y2=y, class_=f"line-{colour}"),
        element("circle", cx=middle, cy=y, r=4, class_=f"fill-{colour}"),
    ]
    if row.goal is not None:
        goal = x.place(math.log2(row.goal))
        parts.append(element("line", x1=goal, x2=goal, y1=y - 6, y2=y + 6, class_="line-c"))
    return parts


def write_picture(rows: Sequence[Row], folder: Path) -> None:
    """Write bench.png and bench.svg: green where the goal (grey mark) is met."""
    title = "how much faster than what one would use instead"
    write_plot(Plot("bench", title, draw_ratios(title, rows)), folder)


def write_plot(plot: Plot, folder: Path) -> None:
    """Write a plot as NAME.png, and as NAME.svg for the README."""
    write_pictures([plot], folder)
    (folder / f"{plot.name}.svg").write_text(format_svg(plot) + "\n")
