"""One file per task: how its rows are encoded, which model class it needs, how it is scored.

`protocol.py` says what a task must know · `registry.py` finds one by name; a new task is one new file, a line
there and one in `recipe/schema.py` · `likelihood.py` has what all that foretell tokens share, `one_label.py` what those
do that say one label of several · `loading.py` loads a model folder for a task · `generation.py` lets it write ·
`onnx_files.py` names what it is exported as · `class_weights.py` says what each label counts · `units.py` is what
numbers are counted in while a model is trained · `intervals.py` has the statistics.
No torch or transformers at import: a task names its model class, and imports torch only inside its loss.
"""

from job.tasks.causal_lm import encode_prompt, find_end
from job.tasks.chat import list_turns, render_chat
from job.tasks.class_weights import weigh_labels
from job.tasks.generation import configure_greedy, write_greedily
from job.tasks.intervals import bound_mean, estimate_margin
from job.tasks.loading import load_model, open_trained
from job.tasks.one_label import share_out
from job.tasks.onnx_files import DECODER, ENCODER, MODEL, list_parts, name_file
from job.tasks.protocol import IGNORED_LABEL, Examples, Task, Truth, cut_at, join_outputs
from job.tasks.question_answering import SpanColumn, Window, find_spans, measure_question, measure_stride
from job.tasks.registry import get_task
from job.tasks.token_classification import find_entities
from job.tasks.units import Units, find_head

__all__ = [
    "DECODER", "ENCODER", "IGNORED_LABEL", "MODEL", "Examples", "SpanColumn", "Task", "Truth", "Units", "Window",
    "bound_mean", "configure_greedy", "cut_at", "encode_prompt", "estimate_margin", "find_end", "find_entities",
    "find_head", "find_spans", "get_task", "join_outputs", "list_parts", "list_turns", "load_model",
    "measure_question", "measure_stride", "name_file", "open_trained", "render_chat", "share_out", "weigh_labels",
    "write_greedily",
]  # fmt: skip
