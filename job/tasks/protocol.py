"""What the rest of the house asks of a task, and what answers are held against.

An *answer* is what is kept of a model's output for one unit: a row, or a token that has a label. Answers
of a split are float32 [units, k], units in the order of the split's rows; what the columns mean is the task's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100
"""Label of a row that only fills up a batch, or of a token that nothing is asked about: it adds nothing to the loss."""


class Encoded(NamedTuple):
    """One row of a token table, made of the example at `place`: a label for the row, or one for each token.

    `cut`: tokens of the example were left out, because it is too long.
    """

    place: int
    ids: list[int]
    types: list[int] | None
    labels: int | list[int]
    cut: bool


@dataclass(frozen=True)
class Truth:
    """`labels` int64 [units], and for each unit the number of its text in the split, int64 [units], ascending."""

    labels: np.ndarray
    rows: np.ndarray


class Task(Protocol):
    """One file of this room each. `classifies`: its labels are named classes; `per_token`: units are tokens;
    `generates`: it writes on from a text.

    `architectures`: how the names of its model classes end, as a config.json gives them · `export_task`: Optimum's name
    of it · `pipeline_tag`: that of the Hub and of transformers' pipelines.
    `max_abs_diff`: by how much answers of the same model may differ between two runtimes in fp32.
    `max_batch_tokens`: how many tokens, padding included, are computed at once where no gradients are kept.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    ort_class: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    export_task: ClassVar[str]
    pipeline_tag: ClassVar[str]
    metric: ClassVar[str]
    classifies: ClassVar[bool]
    per_token: ClassVar[bool]
    generates: ClassVar[bool]
    max_abs_diff: ClassVar[float]
    max_batch_tokens: ClassVar[int]

    def encode(
        self, tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, labels: np.ndarray, max_length: int
    ) -> Iterator[Encoded]:
        """Yield rows of at most `max_length` tokens; `tokenizer`: a fast one of transformers, labels int64 [texts]."""

    def sum_loss(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        """Return the loss summed over units: logits float [rows, …, k] and int64 labels [rows, …] → scalar fp32."""

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Return answers [rows, …, k] of logits and labels, numpy's or torch's; the logits may be overwritten."""

    def logits_of(self, answers: np.ndarray) -> np.ndarray:
        """Return float32 [units, m]: the columns that two runtimes must give alike."""

    def decide(self, answers: np.ndarray) -> np.ndarray:
        """Return int64 [units]: what the model says."""

    def lead(self, answers: np.ndarray) -> np.ndarray:
        """Return float32 [units]: how far what it says is ahead of the next, in logits."""

    def per_row_score(self, answers: np.ndarray, truth: Truth) -> np.ndarray:
        """Return the metric text by text, float64 [texts], higher is better: what gates compare in pairs."""

    def score(self, answers: np.ndarray, truth: Truth) -> dict[str, Any]:
        """Return `metric`, `<metric>_interval` (95 %), n (texts) and what else is worth knowing."""

    def min_rows(self, max_drop: float) -> int:
        """Return the fewest test rows on which a drop of at most `max_drop` can be proved."""
