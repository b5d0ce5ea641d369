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
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta",
}  # fmt: skip
CERTAIN = {
    "fill-mask": _ENCODERS | {"modernbert"},
    "question-answering": _ENCODERS,
    "text-classification": _ENCODERS | {"modernbert"},
    "token-classification": _ENCODERS | {"modernbert"},
    "text-generation-with-past": {"gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"},
    "text2text-generation-with-past": {"bart", "marian", "mbart", "mt5", "pegasus", "t5"},
}
"""Optimum's name of a task → `model_type` of models that it exports."""
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
"""What a tokenizer gives, and all that a model which does not write may ask for."""


def is_certain(run: Run) -> bool:
    """Tell whether the run's model is one that needs no `refuse_unexportable`."""
    return _is_certain(run.base_model, get_task(run.recipe.kind))


def _is_certain(folder: Path, task: Task) -> bool:
    return read_config(folder).get("model_type") in CERTAIN[task.export_task]


def refuse_unexportable(run: Run) -> dict[str, Any]:
    """Raise RecipeError (10) where the run would train a model that Optimum does not export; a stage's function."""
    check_exportable(run.base_model, get_task(run.recipe.kind))
    return {}


def check_exportable(folder: Path, task: Task) -> None:
    """Let Optimum export a model of the kind in `folder` for this task; raise RecipeError (10) where it cannot."""
    if _is_certain(folder, task):
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not _register(config, task):
        raise RecipeError(
            f"model.id: Optimum cannot export a model of kind {config.model_type!r} for {task.name} to ONNX, without "
            f"which nothing is released; name another model ({', '.join(sorted(CERTAIN[task.export_task]))}, …)"
        )


def _register(config: Any, task: Task) -> bool:
    """Let Optimum know the task for models of this kind, unless it does; tell whether they can be exported."""
    from optimum.exporters.onnx import model_configs  # noqa: F401  # registers what it knows
    from optimum.exporters.tasks import TasksManager

    kind = config.model_type
    try:
        known = TasksManager.get_supported_tasks_for_model_type(kind, "onnx", library_name="transformers")
    except KeyError:
        return False
    if task.generates:
        return task.export_task in known
    described_by = next(iter(known.values())).func
    TasksManager.create_register("onnx")(kind, task.export_task)(described_by)
    return set(known[task.export_task](config).inputs) <= _INPUTS
