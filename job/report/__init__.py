"""Reporting: numbers of the stages in, things for people out.

`result.py` assembles the result line, DESIGN §6 · `console.py` prints the closing table and lists a
store · `page.py` writes report.html · `card.py` writes the model card and metrics.json. Decides nothing.
"""

from job.report.card import write_report
from job.report.console import print_listing, print_result
from job.report.result import assemble_result

__all__ = ["assemble_result", "print_listing", "print_result", "write_report"]
