"""Text classification: one label of two or more for a text or a pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100
"""Label of a row that only fills up a batch: it adds nothing to the loss."""


class TextClassification:
    """Sequence classification with cross-entropy, judged by accuracy."""

    name = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    metric = "accuracy"

    def sum_loss(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        """Return the cross-entropy summed over rows: logits float [rows, labels], labels int64 [rows] → scalar fp32."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(
            logits.float(), labels, reduction="sum", ignore_index=IGNORED_LABEL, label_smoothing=smoothing
        )

    def per_row_score(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the metric row by row: logits float [rows, labels], labels int [rows] → float64 [rows] of 0 or 1."""
        return (logits.argmax(axis=1) == labels).astype(np.float64)

    def score(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Return accuracy and macro F1 of logits float [rows, labels] against labels int [rows]."""
        predicted = logits.argmax(axis=1)
        return {
            "accuracy": round(float((predicted == labels).mean()), 6),
            "macro_f1": round(_macro_f1(predicted, labels, logits.shape[1]), 6),
            "n": len(labels),
        }


def _macro_f1(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Unweighted mean of the F1 of every class that occurs in labels or predictions."""
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits, actual, claimed = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    present = (actual + claimed) > 0
    return float((2 * hits[present] / (actual + claimed)[present]).mean())
