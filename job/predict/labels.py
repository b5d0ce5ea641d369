"""What is said of a whole text: its likeliest label, or all of its labels, or a number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding

from job.predict.reader import Reader, read_labels, share_out
from job.predict.tokens import Text
from job.tasks import Task


class Classifier(Reader):
    """Answers {"text", "label", "score", "scores"}: `score` is the probability of `label`, `scores` has every label's.

    Probabilities are rounded to 6 digits.
    """

    def __init__(self, folder: Path, precision: str, threads: int, task: Task) -> None:
        super().__init__(folder, precision, threads, task)
        self._labels = read_labels(self.config)

    def count_logits(self) -> int:
        """Return the number of labels."""
        return len(self._labels)

    def answer(self, text: Text, rows: Sequence[tuple[Encoding, np.ndarray]]) -> dict[str, Any]:
        """Return the answer to one text, which is one row."""
        shares = share_out(rows[0][1])
        scores = self._name(shares)
        best = self._labels[int(shares.argmax())]
        return {"text": text, "label": best, "score": scores[best], "scores": scores}

    def _name(self, shares: np.ndarray) -> dict[str, float]:
        """Return label → probability."""
        return {label: round(float(share), 6) for label, share in zip(self._labels, shares, strict=True)}


class MultiLabelClassifier(Classifier):
    """Answers {"text", "labels", "scores"}: every label that is likelier than not, and the probability of each."""

    def answer(self, text: Text, rows: Sequence[tuple[Encoding, np.ndarray]]) -> dict[str, Any]:
        """Return the answer to one text; `labels` may be empty."""
        logits = rows[0][1]
        said = [label for label, logit in zip(self._labels, logits, strict=True) if logit > 0]
        return {"text": text, "labels": said, "scores": self._name(1 / (1 + np.exp(-logits)))}


class Regressor(Classifier):
    """Answers {"text", "score"}: a number in the units of the labels, of seven digits, as fp32 has them."""

    def answer(self, text: Text, rows: Sequence[tuple[Encoding, np.ndarray]]) -> dict[str, Any]:
        """Return the answer to one text."""
        return {"text": text, "score": float(f"{rows[0][1][0]:.7g}")}
