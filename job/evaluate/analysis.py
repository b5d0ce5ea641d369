"""What the report shows of a split beside its metric: lengths, and for classifiers confusion, calibration, mistakes.

Numbers only; `report/` draws them. Texts of the worst mistakes are cut and stay out of every record.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from job.data import TokenTable
from job.recipe import Run
from job.tasks import Task, Truth, share_out

_LENGTH_BINS = 24
_CONFIDENCE_BINS = 15
"""As Guo et al. 2017, «On Calibration of Modern Neural Networks», count them."""
_MISTAKES, _SHOWN_LETTERS = 10, 400


def analyse_answers(run: Run, task: Task, answers: np.ndarray) -> dict[str, Any]:
    """Return `lengths` of the train rows and, of a classifier's answers float32 [rows, labels] on the test split,
    `confusion`, `calibration` and `mistakes`.
    """
    data, table = run.read("data.json"), TokenTable.open(run.tokens("test"))
    found: dict[str, Any] = {"lengths": count_lengths(TokenTable.open(run.tokens("train")).lengths)}
    found["lengths"] |= {"max_length": data["max_length"], "cut": data["truncated_share"]}
    truth = table.truth
    single = truth.labels.ndim == 1 and not task.per_token
    if task.classifies and single and answers.shape == (len(truth.labels), len(data["labels"])):
        probabilities, texts = share_out(answers.astype(np.float64)), run.read("test.json")
        found["confusion"] = {"labels": data["labels"], "cells": count_confusions(task.decide(answers), truth)}
        found["calibration"] = measure_calibration(probabilities, truth)
        found["mistakes"] = [
            {"row": int(table.rows[place]), **about, **_quote(texts, place)}
            for place, about in find_mistakes(probabilities, truth)
        ]
    return found


def count_lengths(lengths: np.ndarray) -> dict[str, Any]:
    """Return a histogram of int64 [rows]: `counts` of bins of `width` tokens from 0 on, and mean, median, p95, longest.

    The first bin holds 1 to `width` tokens.
    """
    longest = int(lengths.max())
    width = max(-(-longest // _LENGTH_BINS), 1)
    counts = np.bincount((lengths - 1) // width, minlength=-(-longest // width))
    return {
        "width": width,
        "counts": counts.tolist(),
        "mean": round(float(lengths.mean()), 1),
        "median": float(np.median(lengths)),
        "p95": round(float(np.percentile(lengths, 95)), 1),
        "longest": longest,
    }


def count_confusions(said: np.ndarray, truth: Truth) -> list[list[int]]:
    """Return [true label, said label, rows] of every pair that occurs, in order."""
    pairs, counts = np.unique(np.stack([truth.labels, said], axis=1), axis=0, return_counts=True)
    return [[int(true), int(label), int(count)] for (true, label), count in zip(pairs, counts, strict=True)]


def measure_calibration(probabilities: np.ndarray, truth: Truth) -> dict[str, Any]:
    """Return the expected calibration error of float64 [rows, labels], and the bins that it is made of.

    Each bin has {low, high, n, confidence, accuracy}: the mean probability of what is said, and how often it is right.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth.labels
    bins, place = [], np.minimum((confidence * _CONFIDENCE_BINS).astype(int), _CONFIDENCE_BINS - 1)
    for number in np.unique(place):
        chosen = place == number
        bins.append({
            "low": round(float(number) / _CONFIDENCE_BINS, 4), "high": round(float(number + 1) / _CONFIDENCE_BINS, 4),
            "n": int(chosen.sum()), "confidence": round(float(confidence[chosen].mean()), 6),
            "accuracy": round(float(right[chosen].mean()), 6),
        })  # fmt: skip
    gap = sum(each["n"] * abs(each["accuracy"] - each["confidence"]) for each in bins) / len(right)
    return {"expected_calibration_error": round(gap, 6), "n": len(right), "bins": bins}


def find_mistakes(probabilities: np.ndarray, truth: Truth) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (position, {true, said, probability}) of the rows that are answered wrongly with the most confidence."""
    said, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(said != truth.labels)
    for row in wrong[np.argsort(-confidence[wrong], kind="stable")][:_MISTAKES].tolist():
        about = {"true": int(truth.labels[row]), "said": int(said[row])}
        yield row, about | {"probability": round(float(confidence[row]), 6)}


def _quote(texts: dict[str, Any], position: int) -> dict[str, str]:
    shown = {"text": texts["texts"][position]} | ({"pair": texts["pairs"][position]} if texts["pairs"] else {})
    return {name: text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}…" for name, text in shown.items()}
