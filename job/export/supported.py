"""Which models Optimum exports, said before they are trained.

What is certain stands here and costs nothing to know. Of any other kind Optimum itself is asked, whose import takes
seconds. A head that it does not list on a body that it does (questions to ModernBERT, tags by Llama) is exported by
that body's description, which says what goes in; parity with torch on all test rows says whether that was right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job.errors import RecipeError
from job.recipe import Run
from job.store.models import read_config
from job.tasks import Task, get_task

_ENCODERS = {
    "albert",
    "bert",
    "camembert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "mpnet",
    "roberta",
    "xlm-roberta",
}
CERTAIN = {
    "fill-mask": _ENCODERS | {"modernbert"},
    "question-answering": _ENCODERS,
    "text-classification": _ENCODERS | {"modernbert"},
    "token-classification": _ENCODERS | {"modernbert"},
    "text-generation-with-past": {"gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"},
    "text2text-generation-with-past": {"bart", "marian", "mbart", "mt5", "pegasus", "t5"},
}
"""Optimum's name of a task → `model_type` of models that it exports."""


def is_certain(run: Run) -> bool:
    """Tell whether the run's model is one that needs no `refuse_unexportable`."""
    return _name_kind(run.base_model) in CERTAIN[get_task(run.recipe.kind).export_task]


def refuse_unexportable(run: Run) -> dict[str, Any]:
    """Raise RecipeError (10) where the run would train a model that Optimum does not export; a stage's function."""
    check_exportable(run.base_model, get_task(run.recipe.kind))
    return {}


def check_exportable(folder: Path, task: Task) -> None:
    """Let Optimum export a model of the kind in `folder` for this task; raise RecipeError (10) where it cannot."""
    kind = _name_kind(folder)
    if kind in CERTAIN[task.export_task]:
        return
    from optimum.exporters.onnx import model_configs  # noqa: F401  # registers what it knows
    from optimum.exporters.tasks import TasksManager

    try:
        known = TasksManager.get_supported_tasks_for_model_type(kind, "onnx", library_name="transformers")
    except KeyError:
        known = {}
    if known and not task.generates:
        described_by = next(iter(known.values())).func
        TasksManager.create_register("onnx")(kind, task.export_task)(described_by)
    elif task.export_task not in known:
        raise RecipeError(
            f"model.id: Optimum cannot export a model of kind {kind!r} for {task.name} to ONNX, so nothing could be "
            f"released; name another model ({', '.join(sorted(CERTAIN[task.export_task]))}, …)"
        )


def _name_kind(folder: Path) -> str:
    return str(read_config(folder).get("model_type"))
