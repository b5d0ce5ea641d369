"""Multi-label classification: any number of labels for a text or a pair of texts, each decided on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from job.tasks.intervals import normal_interval, spread_ratio
from job.tasks.protocol import IGNORED_LABEL, Examples, Truth
from job.tasks.text_classification import TextClassification

if TYPE_CHECKING:
    import torch


class MultiLabel(TextClassification):
    """Sequence classification with a sigmoid for each label, judged by the F1 of all labels (micro-average).

    A label is said where its logit is above 0, that is, likelier than not. Labels of a row are float32 [labels], 1
    where the text has the label.
    """

    name: ClassVar[str] = "text-classification:multi_label_classification"
    metric: ClassVar[str] = "micro_f1"
    limits: ClassVar[str] = """Texts are cut after {max_length} tokens ({truncated_share:.1%} of the train rows were).
  The labels are {labels}; the model gives any number of them to any text, also to one that has nothing to do with
  them."""
    problem_type: ClassVar[str | None] = "multi_label_classification"
    label_type: ClassVar[str] = "float32"

    def _label(self, examples: Examples, place: int) -> list[float]:
        present = set((examples.targets or [])[place])
        return [float(label in present) for label in range(len(examples.names))]

    def sum_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the binary cross-entropy summed over rows and labels; logits and labels float [rows, labels].

        A weight is that of the rows that have the label (`pos_weight`).
        """
        from torch.nn.functional import binary_cross_entropy_with_logits

        asked = (labels[:, :1] != IGNORED_LABEL).float()
        wanted = labels * (1 - smoothing) + smoothing / 2
        return binary_cross_entropy_with_logits(
            logits.float(), wanted, weight=asked, reduction="sum", pos_weight=weights
        )

    def count_loss(self, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Return the number of decisions, whatever they weigh, as torch does."""
        return (labels != IGNORED_LABEL).sum()

    def decide(self, answers: np.ndarray) -> np.ndarray:
        """Return 1 for each label that is said, else 0, int64 [rows, labels]."""
        return (answers > 0).astype(np.int64)

    def agree(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return bool [rows]: where two answers say the same set of labels."""
        return np.asarray((self.decide(one) == self.decide(other)).all(axis=1))

    def lead(self, answers: np.ndarray) -> np.ndarray:
        """Return how far the closest call of a row is from 0, in logits."""
        return np.asarray(np.abs(answers).min(axis=1))

    def per_row_score(self, answers: np.ndarray, truth: Truth) -> np.ndarray:
        """Return for each text what it adds to F1, so that their mean is the F1 of all.

        F1 is 2 · hits over labels said and there, a ratio of sums.
        """
        return self.weigh_counts(self.per_row_counts(answers, truth))

    def per_row_counts(self, answers: np.ndarray, truth: Truth) -> np.ndarray:
        """Return int64 [texts, 2]: labels that are right; said and there."""
        said, there = self.decide(answers), truth.labels.astype(np.int64)
        return np.stack([(said * there).sum(axis=1), (said + there).sum(axis=1)], axis=1)

    def weigh_counts(self, counts: np.ndarray) -> np.ndarray:
        """Return what each text adds to F1."""
        hits, sizes = counts.T
        return spread_ratio(2.0 * hits, sizes)

    def score(self, answers: np.ndarray, truth: Truth) -> dict[str, Any]:
        """Return micro and macro F1, the share of texts with exactly the right labels, and of wrong decisions."""
        said, there, texts = self.decide(answers), truth.labels.astype(np.int64), self.per_row_score(answers, truth)
        hits, sizes = (said * there).sum(axis=0), (said + there).sum(axis=0)
        present = sizes > 0
        return {
            "micro_f1": round(float(texts.mean()), 6),
            "micro_f1_interval": normal_interval(texts, (0.0, 1.0)),
            "macro_f1": round(float((2 * hits[present] / sizes[present]).mean()) if present.any() else 0.0, 6),
            "subset_accuracy": round(float((said == there).all(axis=1).mean()), 6),
            "hamming_loss": round(float((said != there).mean()), 6),
            "n": len(texts),
        }

    def confirms(self, told: Sequence[dict[str, Any]], answers: np.ndarray, truth: Truth, tolerance: float) -> bool:
        """Tell whether the labels, and the probability of each, are those of the logits `answers`."""
        names, said = truth.about["names"], self.decide(answers)
        shares = 1 / (1 + np.exp(-answers.astype(np.float64)))
        found = np.array([[answer["scores"][name] for name in names] for answer in told])
        labelled = np.array([[name in answer["labels"] for name in names] for answer in told])
        unlike = (labelled != said) & (np.abs(answers) > 2 * tolerance)
        return bool(np.abs(found - shares).max() <= tolerance and not unlike.any())
