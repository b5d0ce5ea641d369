"""Numbers of a run as its stages leave them, for the tests of the report; labels and texts as bad as data can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from job.evaluate.analysis import (
    count_confusions,
    count_lengths,
    find_mistakes,
    measure_calibration,
)
from job.recipe import Recipe, Run
from job.report.plots import Numbers
from job.report.result import assemble_result
from job.tasks import Truth, get_task, share_out

NASTY = [
    '</title><script src="https://evil.example/x.js">alert(1)</script>',
    "\x00\ud800 & <b onclick='x'> \u202e\x1b[31m",
    "مرحبا بالعالم",
    "很长的标签名称很长的标签名称很长的标签名称",
    "a name that is much longer than any column of any chart could ever be",
    "negative",
]


def make_run(work: Path, labels: list[str]) -> Run:
    """A run's folder with what the page reads of it."""
    recipe = {
        "name": "reviews", "task": "text-classification", "model": {"id": "/home/me/model"},
        "data": {"source": "https://data.example/<x>"}, "store": {"uri": "s3://bucket/prefix"},
    }  # fmt: skip
    run = Run("run-1", Recipe.model_validate(recipe), work)
    rows = {"train": 1200, "validation": 100, "test": 400}
    run.write("data.json", {"rows": rows, "set_aside": {"train": 3}, "leaked": {}, "labels": labels})
    return run


def make_numbers(labels: list[str], *, steps: int = 60) -> Numbers:
    """Numbers of a text classification with these labels: 400 test rows, answered by a noisy oracle."""
    rng = np.random.default_rng(5)
    truth = Truth(rng.integers(0, len(labels), 400), np.arange(400))
    answers = rng.normal(size=(400, len(labels))).astype(np.float32)
    answers[np.arange(400), truth.labels] += 2.0
    task = get_task("text-classification")
    scores = task.score(answers, truth)
    probabilities = share_out(answers)
    quotes = {"text": NASTY[0] * 2, "pair": NASTY[2] * 20}
    analysis = {
        "lengths": count_lengths(rng.integers(3, 65, 1200)) | {"max_length": 64, "cut": 0.0125},
        "confusion": {"labels": labels, "cells": count_confusions(task.decide(answers), truth)},
        "calibration": measure_calibration(probabilities, truth),
        "mistakes": [{"row": place, **about, **quotes} for place, about in find_mistakes(probabilities, truth)],
    }
    records = {"train": _make_training(steps), "evaluate": _make_evaluation(scores), **_make_exports(scores)}
    return Numbers(task.metric, records, assemble_result("run-1", records), analysis)


def _make_training(steps: int) -> dict[str, Any]:
    history: list[dict[str, Any]] = [
        {"step": step, "loss": 2 / step, "learning_rate": 1e-4 / step, "grad_norm": float("inf") if step == 2 else 1.5,
         "tokens_per_second": 5000.0 + step} for step in range(1, steps + 1)
    ]  # fmt: skip
    history += [{"step": step, "eval_loss": 2.2 / step, "eval_accuracy": 1 - 1 / step} for step in (20, 40)]
    first = {
        "epoch": 1,
        "began": "2026-11-26T06:52:19.465+00:00",
        "ended": None,
        "exit_code": None,
        "resumed_from": None,
    }
    last = first | {"epoch": 2, "resumed_from": 30}
    return {
        "steps": steps, "samples_per_second": 80.1, "tokens_per_second": 5211, "resumed_from": 30, "world_size": 2,
        "precision": "bf16", "seconds": 75.0, "history": history, "attempts": [first, last],
        "trainable_parameters": 22_713_986, "checkpoint_bytes": 272_000_000, "peak_memory_bytes": 1_400_000_000,
    }  # fmt: skip


def _make_evaluation(scores: dict[str, Any]) -> dict[str, Any]:
    majority = scores | {"accuracy": 0.2, "accuracy_interval": [0.163, 0.242], "macro_f1": 0.05}
    return {"test": scores, "validation": scores, "baselines": {"majority": majority}}


def _make_exports(scores: dict[str, Any]) -> dict[str, Any]:
    file = {"size": 23 << 20, "size_ratio": 0.25, "measured_on": "a processor", "n": 400, "margin": 0.01}
    judged = {
        "metric": scores["accuracy"] - 0.01,
        "drop": 0.01,
        "drop_bound": 0.02,
        "agreement": 0.97,
        "ms_per_row": 1.2,
    }
    target = {"accepted": True, "speedup": 2.5, "rung": "dynamic u8s8", "file": "model_quantized.onnx"}
    latency = [{"batch": 8, "tokens": 16, "threads": 1, "ms": {"torch": 9.0, "fp32": 3.0, "portable": 1.2}}]
    parity = {"tokens": 64, "n": 400, "max_abs_logit_diff": 2e-6, "agreement": 1.0}
    return {
        "export": {"max_abs_logit_diff": 2e-6, "agreement": 1.0, "n": 400, "by_length": [parity],
                   "worst": [{"row": 7, "difference": 2e-6}]},
        "quantize": {"fp32": scores | {"ms_per_row": 3.0, "size": 86 << 20}, "latency": latency,
                     "targets": {"portable": file | judged | target}},
    }  # fmt: skip
