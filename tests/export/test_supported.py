"""What cannot be exported is known before anything is trained, and what is said to be certain is so."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from job.errors import RecipeError
from job.export.supported import CERTAIN, check_exportable
from job.tasks import get_task


@pytest.mark.parametrize("export_task", CERTAIN)
def test_optimum_exports_what_is_certain(export_task: str) -> None:
    from optimum.exporters.onnx import model_configs  # noqa: F401
    from optimum.exporters.tasks import TasksManager

    for kind in CERTAIN[export_task]:
        known = TasksManager.get_supported_tasks_for_model_type(kind, "onnx", library_name="transformers")
        assert export_task in known, kind


@pytest.mark.parametrize(
    ("kind", "task"),
    [("convbert", "text-classification"), ("modernbert", "question-answering"), ("llama", "token-classification"),
     ("gemma", "causal-lm"), ("m2m_100", "seq2seq-lm")],
)  # fmt: skip
def test_what_optimum_exports_or_could_is_let_through(kind: str, task: str, tmp_path: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    check_exportable(tmp_path, get_task(task))


def test_a_model_is_of_the_kind_that_transformers_takes_it_for(tmp_path: Path) -> None:
    """Old folders name no kind; then their own name tells."""
    (tmp_path / "convbert").mkdir()
    (tmp_path / "convbert" / "config.json").write_text("{}")
    check_exportable(tmp_path / "convbert", get_task("text-classification"))


@pytest.mark.parametrize(
    ("kind", "task"),
    [("xlnet", "text-classification"), ("led", "seq2seq-lm"), ("electra", "causal-lm"),
     pytest.param("t5", "text-classification", id="which takes what its decoder is given"),
     pytest.param("longformer", "question-answering", id="which takes a mask that no tokenizer gives")],
)  # fmt: skip
def test_what_optimum_does_not_export_is_refused_by_name(kind: str, task: str, tmp_path: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=f"'{kind}' for {task} to ONNX.*name another model") as caught:
        check_exportable(tmp_path, get_task(task))
    assert caught.value.exit_code == 10
