"""One file per task: what its columns are, which model class it needs, how it is scored.

`registry.py` finds a task by name; a new task is one new file and one line there · `loading.py`
loads a model folder for a task · `intervals.py` has the statistics. No torch or transformers at
import: a task names its model class, and imports torch only inside its loss.
"""

from job.tasks.intervals import bound_mean, estimate_margin, wilson_interval
from job.tasks.loading import load_model
from job.tasks.registry import get_task
from job.tasks.text_classification import TextClassification

__all__ = ["TextClassification", "bound_mean", "estimate_margin", "get_task", "load_model", "wilson_interval"]
