"""Evaluation: the trained model and what it is compared with, on the same test rows.

Enters: tokenized splits and model folders. Leaves: metrics with intervals, and the answers that the
export is held against. `score.py` is the stage · `inference.py` runs a model over a split ·
`writing.py` lets one write, `overlap.py` holds that against what was expected · `baselines.py`
measures what needs no training · `analysis.py` finds what the report shows beside the metric ·
`current.py` compares with the release that is current.
"""

from job.evaluate.current import compare_with_current
from job.evaluate.score import evaluate_run

__all__ = ["compare_with_current", "evaluate_run"]
