"""What cannot be exported is known before anything is trained, and what is said to be certain is so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.errors import RecipeError
from job.export.supported import CERTAIN, check_exportable
from job.tasks import get_task


@pytest.mark.parametrize("export_task", CERTAIN)
def test_optimum_exports_what_is_certain(export_task: str) -> None:
    from optimum.exporters.onnx import model_configs  # noqa: F401
    from optimum.exporters.tasks import TasksManager

    for kind in CERTAIN[export_task]:
        assert export_task in TasksManager.get_supported_tasks_for_model_type(kind, "onnx", "transformers"), kind


@pytest.mark.parametrize(
    ("kind", "task", "can"),
    [("convbert", "text-classification", True), ("xlnet", "text-classification", False),
     ("modernbert", "question-answering", True), ("bert", "causal-lm", False), (None, "causal-lm", False)],
)  # fmt: skip
def test_what_optimum_does_not_export_is_refused_by_name(
    kind: str | None, task: str, can: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    if can:
        check_exportable(tmp_path, get_task(task))
    else:
        with pytest.raises(RecipeError, match=f"'{kind}' for {task} to ONNX.*name another model") as caught:
            check_exportable(tmp_path, get_task(task))
        assert caught.value.exit_code == 10
