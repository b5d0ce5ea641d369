"""Tasks by the name that a recipe gives."""

from __future__ import annotations

from job.tasks.causal_lm import CausalLM
from job.tasks.protocol import Task
from job.tasks.text_classification import TextClassification

_ALL: tuple[Task, ...] = (TextClassification(), CausalLM())
_TASKS = {task.name: task for task in _ALL}


def get_task(name: str) -> Task:
    """Return the task of a recipe; the schema has already refused unknown names."""
    return _TASKS[name]
