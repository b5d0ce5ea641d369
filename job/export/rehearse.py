"""The last look before a release: the bundle itself, opened as consumers open it, on texts.

Token tables and logits of earlier stages cannot show a tokenizer that does not belong to the model, a file
that was not copied, labels in another order, or inputs that a model does not take (optimum #1500, #1758).
This can. Whatever it finds ends the run with 15.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from job.errors import GateFailed, ResourceExhausted, lacks_memory
from job.export.bundle import int8_file_name
from job.export.gate import MAX_ABS_LOGIT_DIFF
from job.export.measure import MICRO_BATCH_ROWS
from job.recipe import Run
from job.store.manifest import hash_file, list_files

log = logging.getLogger("job.export")

_TOLERANCE = 10 * MAX_ABS_LOGIT_DIFF
"""Padding to the longest of all rows instead of a bucket adds rounding."""


def rehearse_bundle(run: Run) -> dict[str, Any]:
    """Answer the sample texts from `bundle/` with transformers, Optimum and `job predict`; return every file's sha256.

    All must give what the trained model gave for the same rows; the labels must be those of the data, and each ONNX
    file the one that its gate has let through.
    """
    bundle, labels = run.bundle, run.read("data.json")["labels"]
    sample = run.read("sample.json")
    expected = np.load(run.folder / "evaluate" / "test.npy", allow_pickle=False)[sample["positions"]]
    _check_labels(bundle, labels)
    _check_files(run)
    for name, logits in _open_as_users(bundle, sample).items():
        _compare(name, expected, logits)
    _compare_scores(bundle, sample, _softmax(expected), labels)
    log.info(
        "the bundle answers %d texts as the trained model does: transformers, Optimum and job predict", len(expected)
    )
    return {"n": len(expected), "files": {path: hash_file(bundle / path) for path in list_files(bundle)}}


def _check_labels(bundle: Path, labels: list[str]) -> None:
    named = json.loads((bundle / "config.json").read_text()).get("id2label", {})
    if [named.get(str(index)) for index in range(len(labels))] != labels or len(named) != len(labels):
        raise GateFailed(
            f"release: config.json names the labels {list(named.values())[:10]}, the data {labels[:10]}; "
            "nothing is released, the checkpoint is kept"
        )


def _check_files(run: Run) -> None:
    """Hold every ONNX file of the bundle against the digest with which it passed."""
    records = run.read("records.json")
    passed = {"model.onnx": records["export"]["model_sha256"]}
    for target, numbers in records["quantize"]["targets"].items():
        if numbers["accepted"]:
            passed[int8_file_name(target)] = numbers["sha256"]
    found = {path.name: hash_file(path) for path in (run.bundle / "onnx").glob("*.onnx")}
    if found != passed:
        wrong = sorted(name for name in {*found, *passed} if found.get(name) != passed.get(name))
        raise GateFailed(
            f"release: onnx/{wrong[0]} is not the file that passed its gate; nothing is released, the "
            "checkpoint is kept"
        )


def _open_as_users(bundle: Path, sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return logits by file name; raise GateFailed where one does not open."""
    import torch
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = [part for part in (sample["texts"], sample["pairs"]) if part]
    try:
        tokenizer = AutoTokenizer.from_pretrained(bundle)
        trained, loading = AutoModelForSequenceClassification.from_pretrained(
            bundle, use_safetensors=True, output_loading_info=True
        )
        exported = ORTModelForSequenceClassification.from_pretrained(bundle, subfolder="onnx", file_name="model.onnx")
        answers: dict[str, list[np.ndarray]] = {"model.safetensors": [], "onnx/model.onnx": []}
        for start in range(0, len(texts[0]), MICRO_BATCH_ROWS):
            rows = [part[start : start + MICRO_BATCH_ROWS] for part in texts]
            batch = tokenizer(*rows, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                for name, model in zip(answers, (trained, exported), strict=True):
                    answers[name].append(model(**batch).logits.numpy())
    except Exception as error:  # loaders of dozens of models and tokenizers raise errors of any kind
        if lacks_memory(error):
            raise
        raise GateFailed(f"release: the bundle does not open as consumers open it: {str(error)[:300]}") from None
    if loading["missing_keys"]:
        raise GateFailed(f"release: model.safetensors lacks {sorted(loading['missing_keys'])[0]}; nothing is released")
    return {name: np.concatenate(parts) for name, parts in answers.items()}


def _compare_scores(bundle: Path, sample: dict[str, Any], expected: np.ndarray, labels: list[str]) -> None:
    """Ask `job predict`, which knows neither torch nor transformers, for the scores of the fp32 file."""
    lines = [json.dumps([text, pair] if pair else text) for text, pair in _pair_up(sample)]
    command = [sys.executable, "-m", "job", "predict", str(bundle), "--precision", "fp32", "--format", "jsonl"]
    utf8 = os.environ | {"PYTHONUTF8": "1"}
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, encoding="utf-8", env=utf8)
    if done.returncode in (-signal.SIGKILL, ResourceExhausted.exit_code) or lacks_memory(done.stderr):
        raise ResourceExhausted("release: memory is too small for `job predict`; use a larger machine")
    if done.returncode:
        raise GateFailed(f"release: `job predict` does not open the bundle: {done.stderr.strip()[-300:]}")
    # not splitlines(): texts may hold what it takes for the end of a line
    answers = [json.loads(line)["scores"] for line in done.stdout.split("\n") if line]
    found = np.array([[scores[label] for label in labels] for scores in answers])
    _compare("`job predict`", expected, found)


def _pair_up(sample: dict[str, Any]) -> list[tuple[str, str | None]]:
    return list(zip(sample["texts"], sample["pairs"] or [None] * len(sample["texts"]), strict=True))


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def _compare(name: str, expected: np.ndarray, found: np.ndarray) -> None:
    worst = float(np.abs(expected - found).max()) if expected.shape == found.shape else float("inf")
    if not worst <= _TOLERANCE:
        raise GateFailed(
            f"release: {name} with the released tokenizer differs from the trained model by {worst:.3g} on test texts; "
            "nothing is released, the checkpoint is kept"
        )
