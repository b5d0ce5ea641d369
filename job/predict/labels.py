"""A text classifier's answers: the likeliest label of a text, and the probability of every one."""

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
        scores = {label: round(float(share), 6) for label, share in zip(self._labels, shares, strict=True)}
        best = self._labels[int(shares.argmax())]
        return {"text": text, "label": best, "score": scores[best], "scores": scores}
