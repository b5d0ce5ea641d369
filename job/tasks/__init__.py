"""One file per task: what its columns are, which model class it needs, how it is scored.

`get_task(name)` returns the task; a new task is one new file and one line here. No torch or
transformers at import: a task names its model class, and imports torch only inside its loss.
`loading.py` loads a model folder for a task.
"""

from job.tasks.loading import load_model
from job.tasks.text_classification import TextClassification

TASKS = {task.name: task for task in (TextClassification(),)}


def get_task(name: str) -> TextClassification:
    """Return the task of a recipe; the schema has already refused unknown names."""
    return TASKS[name]


__all__ = ["TASKS", "TextClassification", "get_task", "load_model"]
