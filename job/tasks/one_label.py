"""What tasks share whose answers are logits of labels, of which the likeliest is said: of a text, or of each word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from job.tasks.protocol import IGNORED_LABEL, Task

if TYPE_CHECKING:
    import torch


class OneLabel(Task):
    """Answers are the logits as they are, float32 [units, labels]."""

    def sum_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the cross-entropy summed over texts or words → scalar fp32.

        logits float [rows, labels] or [rows, tokens, labels], labels int64 without the last dimension.
        """
        from torch.nn.functional import cross_entropy

        flat, wanted = logits.flatten(0, -2).float(), labels.flatten()
        return cross_entropy(
            flat, wanted, weights, reduction="sum", ignore_index=IGNORED_LABEL, label_smoothing=smoothing
        )

    def count_loss(self, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Return the number of labels, or the sum of their weights, as torch.nn.CrossEntropyLoss does."""
        asked = labels[labels != IGNORED_LABEL]
        return weights[asked].sum() if weights is not None else (labels != IGNORED_LABEL).sum()

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Return the logits as they are."""
        return logits

    def logits_of(self, answers: np.ndarray) -> np.ndarray:
        """Return all of them, float32 [units, labels]."""
        return answers

    def decide(self, answers: np.ndarray) -> np.ndarray:
        """Return the id of the likeliest label, int64 [units]."""
        return np.asarray(answers.argmax(axis=1))

    def lead(self, answers: np.ndarray) -> np.ndarray:
        """Return how far the likeliest label is ahead of the second, in logits."""
        best = np.sort(answers, axis=1)
        return np.asarray(best[:, -1] - best[:, -2])


def share_out(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities (softmax) of logits [..., labels], of their dtype."""
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=-1, keepdims=True))
