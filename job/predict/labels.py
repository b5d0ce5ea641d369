"""What is said of a whole text: its likeliest label, or all of its labels, or a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding

from job.predict.reader import LabelReader
from job.predict.tokens import Text
from job.tasks import share_out


class Classifier(LabelReader):
    """Answers {"text", "label", "score", "scores"}: `score` is the probability of `label`, `scores` has every label's.

    Probabilities are rounded to 6 digits.
    """

    def answer(self, text: Text, rows: Sequence[tuple[Encoding, np.ndarray]]) -> dict[str, Any]:
        """Return the answer to one text, which is one row."""
        shares = share_out(rows[0][1])
        scores = self._name(shares)
        best = self.labels[int(shares.argmax())]
        return {"text": text, "label": best, "score": scores[best], "scores": scores}

    def _name(self, shares: np.ndarray) -> dict[str, float]:
        """Return label → probability."""
        return {label: round(float(share), 6) for label, share in zip(self.labels, shares, strict=True)}


class MultiLabelClassifier(Classifier):
    """Answers {"text", "labels", "scores"}: every label that is likelier than not, and the probability of each."""

    def answer(self, text: Text, rows: Sequence[tuple[Encoding, np.ndarray]]) -> dict[str, Any]:
        """Return the answer to one text; `labels` may be empty."""
        logits = rows[0][1]
        said = [label for label, logit in zip(self.labels, logits, strict=True) if logit > 0]
        return {"text": text, "labels": said, "scores": self._name(1 / (1 + np.exp(-logits)))}


class Regressor(Classifier):
    """Answers {"text", "score"}: a number in the units of the labels, of seven digits, as fp32 has them."""

    def answer(self, text: Text, rows: Sequence[tuple[Encoding, np.ndarray]]) -> dict[str, Any]:
        """Return the answer to one text."""
        return {"text": text, "score": float(f"{rows[0][1][0]:.7g}")}
