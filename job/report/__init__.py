"""Reporting: numbers of the stages in, things for people out.

`result.py` assembles the result line, DESIGN §6 · `console.py` words the closing table and lists a
store · `card.py` writes the model card, metrics.json and all else that follows · `page.py` is report.html,
of `tables.py` and `plots.py`, `versus.py` the page of `job compare` · these draw with `charts.py`, `comparisons.py`,
`axes.py`, in the `style.py` of the page · `markup.py` escapes what data say · `images.py` makes PNG files of the
charts. Decides nothing.
"""

from job.report.card import write_report
from job.report.console import format_comparison, format_result, print_listing
from job.report.page import tell_promotion
from job.report.result import assemble_result
from job.report.versus import render_comparison

__all__ = [
    "assemble_result", "format_comparison", "format_result", "print_listing", "render_comparison", "tell_promotion",
    "write_report",
]  # fmt: skip
