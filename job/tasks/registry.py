"""Tasks by the kind that a recipe gives (`Recipe.kind`)."""

from __future__ import annotations

from job.tasks.causal_lm import CausalLM
from job.tasks.masked_lm import MaskedLM
from job.tasks.multi_label import MultiLabel
from job.tasks.protocol import Task
from job.tasks.question_answering import QuestionAnswering
from job.tasks.regression import Regression
from job.tasks.seq2seq_lm import Seq2SeqLM
from job.tasks.text_classification import TextClassification
from job.tasks.token_classification import TokenClassification

_ALL: tuple[Task, ...] = (
    TextClassification(), MultiLabel(), Regression(), TokenClassification(), QuestionAnswering(), MaskedLM(),
    CausalLM(), Seq2SeqLM(),
)  # fmt: skip
_TASKS = {task.name: task for task in _ALL}


def get_task(kind: str) -> Task:
    """Return the task of a recipe; the schema has already refused unknown names."""
    return _TASKS[kind]
