"""Text classification: one label of two or more for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from job.tasks.intervals import wilson_interval
from job.tasks.one_label import OneLabel, share_out
from job.tasks.protocol import Encoded, Examples, Truth

_TEXTS_AT_ONCE = 1000


class TextClassification(OneLabel):
    """Sequence classification with cross-entropy, judged by accuracy."""

    name: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    ort_class: ClassVar[str] = "ORTModelForSequenceClassification"
    architectures: ClassVar[tuple[str, ...]] = ("ForSequenceClassification",)
    export_task: ClassVar[str] = "text-classification"
    pipeline_tag: ClassVar[str] = "text-classification"
    metric: ClassVar[str] = "accuracy"
    limits: ClassVar[str] = """Texts are cut after {max_length} tokens ({truncated_share:.1%} of the train rows were).
  The labels are {labels}; the model answers one of them to any text, also to one that has nothing to do with them."""
    classifies: ClassVar[bool] = True
    problem_type: ClassVar[str | None] = "single_label_classification"

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Iterator[Encoded]:
        """Yield a row for each text or pair, cut to `max_length` tokens; segments where the model takes them."""
        texts, pairs = examples.texts, examples.pairs
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            span = slice(start, start + _TEXTS_AT_ONCE)
            columns = (texts[span], pairs[span]) if pairs else (texts[span],)
            batch = tokenizer(*columns, truncation=self.truncation, max_length=max_length, padding=False)
            types = batch.get("token_type_ids") if pairs else None
            for line, ids in enumerate(batch["input_ids"]):
                segments, label = types[line] if types else None, self._label(examples, start + line)
                yield Encoded(start + line, ids, segments, label, len(ids) >= max_length)

    def _label(self, examples: Examples, place: int) -> int | float | list[float]:
        """Return what the row of one text is labelled with."""
        return int(examples.labels[place])

    def describe(self, tokenizer: Any, examples: Examples) -> dict[str, Any]:
        """Return the names of the labels."""
        return {"names": list(examples.names)}

    def per_row_score(self, answers: np.ndarray, truth: Truth) -> np.ndarray:
        """Return 1 for each row that is answered rightly, else 0."""
        return (self.decide(answers) == truth.labels).astype(np.float64)

    def score(self, answers: np.ndarray, truth: Truth) -> dict[str, Any]:
        """Return accuracy with Wilson's interval, and macro F1."""
        predicted = self.decide(answers)
        accuracy = round(float((predicted == truth.labels).mean()), 6)
        return {
            "accuracy": accuracy,
            "accuracy_interval": wilson_interval(accuracy, len(predicted)),
            "macro_f1": round(_macro_f1(predicted, truth.labels, answers.shape[1]), 6),
            "n": len(predicted),
        }

    def confirms(self, told: Sequence[dict[str, Any]], answers: np.ndarray, truth: Truth, tolerance: float) -> bool:
        """Tell whether the probabilities are those of the logits `answers`."""
        found = np.array([[answer["scores"][name] for name in truth.about["names"]] for answer in told])
        return bool(np.abs(found - share_out(answers)).max() <= tolerance)


def _macro_f1(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Unweighted mean of the F1 of every class that occurs in labels or predictions."""
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits, actual, claimed = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    present = (actual + claimed) > 0
    return float((2 * hits[present] / (actual + claimed)[present]).mean())
