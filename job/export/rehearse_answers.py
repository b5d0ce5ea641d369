"""The rehearsal of a model that reads: its answers to sample texts, from the bundle alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from job.data import TokenTable
from job.errors import GateFailed
from job.export.consumers import ask_predict, refuse_to_open
from job.export.measure import MICRO_BATCH_ROWS
from job.recipe import Run
from job.tasks import Task, join_outputs, open_trained


def rehearse_answers(run: Run, task: Task) -> dict[str, Any]:
    """Answer the sample texts from `bundle/` with transformers, Optimum and `job predict`; return how many they were.

    All must give what the trained model gave for the same rows, and the labels must be those of the data.
    """
    bundle, sample = run.bundle, Sample(run)
    if task.classifies or task.problem_type:
        _check_labels(bundle, run.read("data.json")["labels"], task.problem_type)
    tolerance = 10 * task.max_abs_diff  # padding to the longest of all rows instead of a bucket adds rounding
    for name, answers in _open_as_users(bundle, task, sample).items():
        _compare(name, task.logits_of(sample.expected), task.logits_of(answers), tolerance)
    rows = [[text, pair] if pair is not None else text for text, pair in sample.texts]
    told = ask_predict(bundle, "fp32", rows)
    if not task.confirms(told, sample.expected, sample.table.truth, tolerance):
        raise GateFailed(
            "release: `job predict` with the released tokenizer does not say what the trained model says to test "
            "texts; nothing is released, the checkpoint is kept"
        )
    return {"n": len(sample.texts)}


class Sample:
    """Test rows that are whole texts: `texts` as (text, pair or None), their `table`, and the `expected` answers."""

    def __init__(self, run: Run) -> None:
        about, whole = run.read("sample.json"), TokenTable.open(run.tokens("sample"))
        alone = _list_alone(np.asarray(whole.rows))
        chosen = [line for line, row in enumerate(about["rows"]) if row in alone]
        places = np.array([alone[about["rows"][line]] for line in chosen], dtype=np.int64)
        pairs = about["pairs"] or [None] * len(about["texts"])
        self.texts: list[tuple[str, str | None]] = [(about["texts"][line], pairs[line]) for line in chosen]
        self.table = whole.take(places)
        answers = np.load(run.folder / "evaluate" / "sample.npy", allow_pickle=False)
        self.expected = answers[np.isin(whole.unit_positions, places)]


def _list_alone(rows: np.ndarray) -> dict[int, int]:
    """Return row number → position of the rows that are a text's only one."""
    numbers, first, counts = np.unique(rows, return_index=True, return_counts=True)
    return {int(row): int(place) for row, place, count in zip(numbers, first, counts, strict=True) if count == 1}


def _check_labels(bundle: Path, labels: list[str], problem_type: str | None) -> None:
    config = json.loads((bundle / "config.json").read_text())
    named = config.get("id2label", {})
    if problem_type and config.get("problem_type") != problem_type:
        raise GateFailed(
            f"release: config.json has problem_type {config.get('problem_type')!r}, the recipe {problem_type!r}; "
            "nothing is released, the checkpoint is kept"
        )
    if [named.get(str(index)) for index in range(len(labels))] != labels or len(named) != len(labels):
        raise GateFailed(
            f"release: config.json names the labels {list(named.values())[:10]}, the data {labels[:10]}; "
            "nothing is released, the checkpoint is kept"
        )


def _open_as_users(bundle: Path, task: Task, sample: Sample) -> dict[str, np.ndarray]:
    """Return answers float32 [units, k] by file name; raise GateFailed where one does not open."""
    import optimum.onnxruntime
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(bundle)
        ort_class = getattr(optimum.onnxruntime, task.ort_class)
        models = {
            "model.safetensors": open_trained(bundle, task),
            "onnx/model.onnx": ort_class.from_pretrained(bundle, subfolder="onnx", file_name="model.onnx"),
        }
        return {name: _answer(model, tokenizer, task, sample) for name, model in models.items()}
    except Exception as error:  # loaders of dozens of models and tokenizers raise errors of any kind
        raise refuse_to_open(error) from None


def _answer(model: Any, tokenizer: Any, task: Task, sample: Sample) -> np.ndarray:
    import torch

    parts = []
    for start in range(0, len(sample.texts), MICRO_BATCH_ROWS):
        places = np.arange(start, min(start + MICRO_BATCH_ROWS, len(sample.texts)))
        columns = zip(*sample.texts[start : start + MICRO_BATCH_ROWS], strict=True)
        chosen = [list(column) for column in columns if None not in column]
        # whatever is said of tokens is held against labels that begin on the left
        side = "right" if task.per_token or task.per_window else tokenizer.padding_side
        batch = tokenizer(*chosen, padding=True, truncation=task.truncation, padding_side=side, return_tensors="pt")
        if batch["attention_mask"].sum(dim=1).tolist() != sample.table.lengths[places].tolist():
            raise GateFailed(
                "release: the released tokenizer cuts test texts otherwise than in training; nothing is released, the "
                "checkpoint is kept"
            )
        with torch.inference_mode():
            logits = join_outputs(task, model(**batch)).float().numpy()
        parts.append((places, task.reduce(logits, sample.table.pad_labels(places))))
    return sample.table.gather(parts)


def _compare(name: str, expected: np.ndarray, found: np.ndarray, tolerance: float) -> None:
    worst = float(np.abs(expected - found).max()) if expected.shape == found.shape else float("inf")
    if not worst <= tolerance:
        raise GateFailed(
            f"release: {name} with the released tokenizer differs from the trained model by {worst:.3g} on test texts; "
            "nothing is released, the checkpoint is kept"
        )
