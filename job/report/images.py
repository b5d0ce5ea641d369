"""Charts as PNG files, for slides and for readers that show no SVG.

The font comes with the package, so that a machine without fonts draws the same; what it lacks (Chinese, Arabic, …) is
taken from the machine's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from job.report.plots import Plot
from job.report.style import write_picture_style

_FONT = Path(__file__).parent / "fonts" / "DejaVuSans.ttf"
_ZOOM = 2.5
"""A chart is 360 pixels wide, its picture 900."""


def write_pictures(plots: Iterable[Plot], folder: Path) -> None:
    """Write NAME.png of every plot into the folder."""
    import resvg_py

    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        svg = format_svg(plot).replace("system-ui,sans-serif", "DejaVu Sans")
        (folder / f"{plot.name}.png").write_bytes(
            bytes(resvg_py.svg_to_bytes(svg_string=svg, font_files=[str(_FONT)], zoom=_ZOOM))
        )


def format_svg(plot: Plot) -> str:
    """Return a plot as an SVG file that stands alone: with its style, on white."""
    style = f'<style>{write_picture_style()}</style><rect width="100%" height="100%" fill="#ffffff"/>'
    head, end, body = plot.svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).partition(">")
    return head + end + style + body
