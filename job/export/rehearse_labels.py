"""The rehearsal of a classifier: scores of sample texts, from the bundle alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from job.errors import GateFailed
from job.export.consumers import ask_predict, refuse_to_open
from job.export.measure import MICRO_BATCH_ROWS
from job.recipe import Run
from job.tasks import Task, open_trained


def rehearse_labels(run: Run, task: Task) -> dict[str, Any]:
    """Answer the sample texts from `bundle/` with transformers, Optimum and `job predict`; return how many they were.

    All must give what the trained model gave for the same rows, and the labels must be those of the data.
    """
    bundle, labels, sample = run.bundle, run.read("data.json")["labels"], run.read("sample.json")
    expected = np.load(run.folder / "evaluate" / "test.npy", allow_pickle=False)[sample["positions"]]
    tolerance = 10 * task.max_abs_diff  # padding to the longest of all rows instead of a bucket adds rounding
    _check_labels(bundle, labels)
    for name, logits in _open_as_users(bundle, task, sample).items():
        _compare(name, expected, logits, tolerance)
    _compare_scores(bundle, sample, _softmax(expected), labels, tolerance)
    return {"n": len(expected)}


def _check_labels(bundle: Path, labels: list[str]) -> None:
    named = json.loads((bundle / "config.json").read_text()).get("id2label", {})
    if [named.get(str(index)) for index in range(len(labels))] != labels or len(named) != len(labels):
        raise GateFailed(
            f"release: config.json names the labels {list(named.values())[:10]}, the data {labels[:10]}; "
            "nothing is released, the checkpoint is kept"
        )


def _open_as_users(bundle: Path, task: Task, sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return logits by file name; raise GateFailed where one does not open."""
    import optimum.onnxruntime
    import torch
    from transformers import AutoTokenizer

    texts = [part for part in (sample["texts"], sample["pairs"]) if part]
    try:
        tokenizer = AutoTokenizer.from_pretrained(bundle)
        trained, ort_class = open_trained(bundle, task), getattr(optimum.onnxruntime, task.ort_class)
        exported = ort_class.from_pretrained(bundle, subfolder="onnx", file_name="model.onnx")
        answers: dict[str, list[np.ndarray]] = {"model.safetensors": [], "onnx/model.onnx": []}
        for start in range(0, len(texts[0]), MICRO_BATCH_ROWS):
            rows = [part[start : start + MICRO_BATCH_ROWS] for part in texts]
            batch = tokenizer(*rows, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                for name, model in zip(answers, (trained, exported), strict=True):
                    answers[name].append(model(**batch).logits.numpy())
    except Exception as error:  # loaders of dozens of models and tokenizers raise errors of any kind
        raise refuse_to_open(error) from None
    return {name: np.concatenate(parts) for name, parts in answers.items()}


def _compare_scores(
    bundle: Path, sample: dict[str, Any], expected: np.ndarray, labels: list[str], tolerance: float
) -> None:
    """Ask `job predict`, which knows neither torch nor transformers, for the scores of the fp32 file."""
    rows = [[text, pair] if pair else text for text, pair in _pair_up(sample)]
    answers = ask_predict(bundle, "fp32", rows)
    found = np.array([[answer["scores"][label] for label in labels] for answer in answers])
    _compare("`job predict`", expected, found, tolerance)


def _pair_up(sample: dict[str, Any]) -> list[tuple[str, str | None]]:
    return list(zip(sample["texts"], sample["pairs"] or [None] * len(sample["texts"]), strict=True))


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def _compare(name: str, expected: np.ndarray, found: np.ndarray, tolerance: float) -> None:
    worst = float(np.abs(expected - found).max()) if expected.shape == found.shape else float("inf")
    if not worst <= tolerance:
        raise GateFailed(
            f"release: {name} with the released tokenizer differs from the trained model by {worst:.3g} on test texts; "
            "nothing is released, the checkpoint is kept"
        )
