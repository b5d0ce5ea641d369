"""One file per task: how its rows are encoded, which model class it needs, how it is scored.

`protocol.py` says what a task must know · `registry.py` finds one by name; a new task is one new file, a line
there and one in `recipe/schema.py` · `likelihood.py` has what all that foretell tokens share · `loading.py` loads a
model folder for a task · `units.py` is what numbers are counted in while a model is trained · `intervals.py` has the
statistics. No torch or transformers at import: a task names its model class, and imports torch only inside its loss.
"""

from job.tasks.causal_lm import encode_prompt, find_end
from job.tasks.chat import list_turns, render_chat
from job.tasks.intervals import bound_mean, estimate_margin
from job.tasks.loading import load_model, open_trained
from job.tasks.protocol import IGNORED_LABEL, Examples, Task, Truth, join_outputs
from job.tasks.question_answering import Window, cut_question, find_spans, measure_stride
from job.tasks.registry import get_task
from job.tasks.token_classification import find_entities
from job.tasks.units import Units, find_head

__all__ = [
    "IGNORED_LABEL", "Examples", "Task", "Truth", "Units", "Window", "bound_mean", "cut_question", "encode_prompt",
    "estimate_margin", "find_end", "find_entities", "find_head", "find_spans", "get_task", "join_outputs", "list_turns",
    "load_model", "measure_stride", "open_trained", "render_chat",
]  # fmt: skip
