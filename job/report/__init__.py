"""Reporting: numbers of the stages in, things for people out.

`result.py` assembles the result line, DESIGN §6 · `console.py` words the closing table and lists a
store · `page.py` writes report.html · `card.py` writes the model card and metrics.json. Decides nothing.
"""

from job.report.card import write_report
from job.report.console import format_result, print_listing
from job.report.result import assemble_result

__all__ = ["assemble_result", "format_result", "print_listing", "write_report"]
