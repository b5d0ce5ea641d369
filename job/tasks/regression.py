"""Regression: a number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from job.tasks.intervals import count_rows, normal_interval, spread_ratio
from job.tasks.protocol import IGNORED_LABEL, Examples, Truth
from job.tasks.text_classification import TextClassification
from job.tasks.units import avoid_filler

if TYPE_CHECKING:
    import torch

_SAID, _LABEL = range(2)
_CLOSE = 0.1
"""Two answers agree where they differ by at most so many standard deviations of the labels."""


class Regression(TextClassification):
    """Sequence classification with one logit and squared errors, judged by R²: the share of variance that is explained.

    An answer has two columns: the number that is said, and the label, whose spread tells what difference matters. 0.01
    of R² is 1 % of the labels' variance. R² is 0 for a model that always says their mean.
    """

    name: ClassVar[str] = "text-classification:regression"
    metric: ClassVar[str] = "r2"
    limits: ClassVar[str] = """Texts are cut after {max_length} tokens ({truncated_share:.1%} of the train rows were).
  The model answers a number ({labels}) to any text, in the units of the data, also to one that has nothing to do with
  them. Agreement is the share of rows where two files differ by at most a tenth of the labels' standard deviation."""
    classifies: ClassVar[bool] = False
    problem_type: ClassVar[str | None] = "regression"
    standardizes: ClassVar[bool] = True
    label_type: ClassVar[str] = "float32"

    def _label(self, examples: Examples, place: int) -> float:
        return float(avoid_filler(np.float32((examples.targets or [])[place])))

    def describe(self, tokenizer: Any, examples: Examples) -> dict[str, Any]:
        """Return nothing: numbers say all themselves."""
        return {}

    def sum_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the squared errors summed over rows: logits float [rows, 1], labels float32 [rows] → scalar fp32."""
        return (logits[:, 0].float() - labels).masked_fill(labels == IGNORED_LABEL, 0.0).square().sum()

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Return answers float32 [rows, 2] of logits float [rows, 1] and labels float32 [rows]."""
        if isinstance(logits, np.ndarray):
            return np.stack([logits[:, 0].astype(np.float32), labels], axis=-1)
        import torch

        return torch.stack([logits[:, 0].float(), labels], dim=-1)

    def logits_of(self, answers: np.ndarray) -> np.ndarray:
        """Return what is said in standard deviations of the labels, float32 [rows, 1]."""
        return np.asarray(answers[:, [_SAID]] / _measure_spread(answers))

    def decide(self, answers: np.ndarray) -> np.ndarray:
        """Return the number that is said, float32 [rows]."""
        return answers[:, _SAID]

    def agree(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return bool [rows]: where two answers differ by at most a tenth of the labels' standard deviation."""
        return np.asarray(np.abs(one[:, _SAID] - other[:, _SAID]) <= _CLOSE * _measure_spread(one))

    def lead(self, answers: np.ndarray) -> np.ndarray:
        """Return infinity: no other answer is the next."""
        return np.full(len(answers), np.inf)

    def per_row_score(self, answers: np.ndarray, truth: Truth) -> np.ndarray:
        """Return for each text what it adds to R², so that their mean is the R² of all."""
        said, labels = answers[:, _SAID].astype(np.float64), truth.labels.astype(np.float64)
        return np.asarray(1.0 - spread_ratio(np.square(said - labels), np.square(labels - labels.mean())))

    def score(self, answers: np.ndarray, truth: Truth) -> dict[str, Any]:
        """Return R², the errors in the labels' own units, and correlations: Pearson's and Spearman's."""
        said, labels = answers[:, _SAID].astype(np.float64), truth.labels.astype(np.float64)
        texts, error = self.per_row_score(answers, truth), said - labels
        return {
            "r2": round(float(texts.mean()), 6),
            "r2_interval": normal_interval(texts, (-np.inf, 1.0)),
            "rmse": float(f"{np.sqrt(np.square(error).mean()):.6g}"),
            "mae": float(f"{np.abs(error).mean():.6g}"),
            "pearson": round(_correlate(said, labels), 6),
            "spearman": round(_correlate(_rank(said), _rank(labels)), 6),
            "n": len(texts),
        }

    def confirms(self, told: Sequence[dict[str, Any]], answers: np.ndarray, truth: Truth, tolerance: float) -> bool:
        """Tell whether the numbers are those of `answers`, but for `tolerance` standard deviations of the labels."""
        found = np.array([answer["score"] for answer in told])
        return bool(np.abs(found - answers[:, _SAID]).max() <= tolerance * _measure_spread(answers))

    def min_rows(self, max_drop: float) -> int:
        """Return what the rule of three wants, 30 at least: an error that few texts show must not stay unseen."""
        return max(count_rows(max_drop), 30)


def _measure_spread(answers: np.ndarray) -> float:
    """Return the standard deviation of the labels in answers; 1 where there is only one."""
    return float(answers[:, _LABEL].astype(np.float64).std()) or 1.0


def _correlate(one: np.ndarray, other: np.ndarray) -> float:
    """Return Pearson's correlation; 0 where one of them is always the same."""
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other / (np.sqrt((one @ one) * (other @ other)) or 1.0))


def _rank(values: np.ndarray) -> np.ndarray:
    """Return the ranks float64 [rows]; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])
