"""Tasks by the name that a recipe gives."""

from __future__ import annotations

from job.tasks.text_classification import TextClassification

_TASKS = {task.name: task for task in (TextClassification(),)}


def get_task(name: str) -> TextClassification:
    """Return the task of a recipe; the schema has already refused unknown names."""
    return _TASKS[name]
