"""What the rest of the house asks of a task, what rows it is given, and what answers are held against.

An *answer* is what is kept of a model's output for one unit: a row, or a token that has a label. Answers
of a split are float32 [units, k], units in the order of the split's rows; what the columns mean is the task's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from job.tasks.intervals import count_rows
from job.tasks.onnx_files import MODEL

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100
"""Label of a row that only fills up a batch, or of a token that nothing is asked about: it adds nothing to the loss."""


@dataclass(frozen=True)
class Examples:
    """`texts` and `pairs` (None for single texts) as strings, `labels` int64 ids, `rows` int64 source row numbers.

    Of prompts and completions the pairs are the completions, of questions and contexts the contexts. Where a row is to
    be answered with more than an id, all ids are 0, and `targets` has for each row what its task reads, as JSON.
    `names[id]` is the label that is released.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray
    rows: np.ndarray
    set_aside: int = 0
    targets: list[Any] | None = None
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, positions: np.ndarray) -> Examples:
        """Return the examples at `positions` (int64), in that order."""
        return replace(
            self,
            texts=[self.texts[i] for i in positions],
            pairs=[self.pairs[i] for i in positions] if self.pairs else None,
            labels=self.labels[positions],
            rows=self.rows[positions],
            targets=[self.targets[i] for i in positions] if self.targets else None,
        )

    @property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of rows, labels and texts in order: the content, whatever file it came from."""
        digest = hashlib.sha256(self.labels.tobytes() + self.rows.tobytes())
        for column in (self.texts, self.pairs or []):
            for text in column:
                encoded = text.encode()
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        if self.targets is not None:
            digest.update(json.dumps([self.targets, self.names]).encode())
        return digest.hexdigest()


class Encoded(NamedTuple):
    """One row of a token table, made of the example at `place`: what the row is labelled with, or each of its tokens.

    `cut`: tokens of the example were left out, because it is too long. `spans`: of each token its first and last + 1
    character in the text that answers are taken from.
    """

    place: int
    ids: list[int]
    types: list[int] | None
    labels: int | float | list[int] | list[float]
    cut: bool
    spans: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class Truth:
    """`labels` [units] or [units, labels] as in the token table, and for each unit the number of its text in the split,
    int64 [units], ascending.

    `about`: what the task has said of the split (`Task.describe`), and where it has any, as `spans` those of the tokens
    of each row, int32 [tokens, 2].
    """

    labels: np.ndarray
    rows: np.ndarray
    about: Mapping[str, Any] = field(default_factory=dict)

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """Return `values` [units, …] text by text."""
        return np.split(values, np.flatnonzero(np.diff(self.rows)) + 1)


class Task(Protocol):
    """One file of this room each. `classifies`: its labels are named classes; `per_token`: units are tokens;
    `generates`: it writes on from a text; `per_window`: a long text becomes rows that overlap, of which one answers;
    `redraws`: a train row is another one every epoch; `is_encoder_decoder`: what is foretold or
    written is another text than the one that is read; `trains_head`: a base model without the head gets a new one.

    `onnx_file`: by which its exported model is named (`onnx_files.py`) ·
    `architectures`: how the names of its model classes end, as a config.json gives them · `outputs`: of the model, one
    of logits or several that are stacked · `export_task`: Optimum's name of it · `pipeline_tag`: that of the Hub and of
    transformers' pipelines · `truncation`: how a tokenizer cuts what is too long, as transformers calls it ·
    `problem_type`: what a config.json says of a sequence classifier's labels · `standardizes`: they are numbers, which
    training counts in standard deviations (`Units`) · `label_type`: numpy's name of what a row's labels are.
    `limits`: what the model card says of them, with the names of data.json's numbers in braces.
    `max_abs_diff`: by how much answers of the same model may differ between two runtimes in fp32.
    `max_batch_tokens`: how many tokens, padding included, are computed at once where no gradients are kept.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    ort_class: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    export_task: ClassVar[str]
    onnx_file: ClassVar[str] = MODEL
    pipeline_tag: ClassVar[str]
    metric: ClassVar[str]
    classifies: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    is_encoder_decoder: ClassVar[bool] = False
    per_window: ClassVar[bool] = False
    redraws: ClassVar[bool] = False
    trains_head: ClassVar[bool] = True
    truncation: ClassVar[str] = "longest_first"
    problem_type: ClassVar[str | None] = None
    standardizes: ClassVar[bool] = False
    label_type: ClassVar[str] = "int64"
    limits: ClassVar[str]
    max_abs_diff: ClassVar[float] = 1e-3
    """Kernels add up in another order, which moves a logit by about 1e-5."""
    max_batch_tokens: ClassVar[int] = 8192

    def encode(self, tokenizer: Any, examples: Examples, max_length: int) -> Iterator[Encoded]:
        """Yield rows of at most `max_length` tokens, in the order of the examples; `tokenizer`: a fast one."""

    def describe(self, tokenizer: Any, examples: Examples) -> dict[str, Any]:
        """Return what must be known of a split beside its labels, as JSON; `texts` has an entry for each text."""
        return {}

    def redraw(
        self, about: Mapping[str, Any], ids: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a train row, ids and labels int64 [tokens], as one epoch has it; `about` as of `describe`."""
        return ids, labels

    def sample(self, tokenizer: Any, examples: Examples, max_length: int) -> Examples:
        """Return test rows as the release is asked about them before it is published: each is one row of tokens."""
        return examples

    def sum_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the loss summed over all labels: logits float [rows, …, k] and labels [rows, …] → scalar fp32.

        `weights`, float [k], is what each label counts; None: 1, and always so for tasks without named labels.
        """

    def count_loss(self, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the sum of `sum_loss` is divided by for the mean: the number of labels → scalar."""
        return (labels != IGNORED_LABEL).sum()

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Return answers [rows, …, k] of logits and labels, numpy's or torch's; the logits may be overwritten."""

    def logits_of(self, answers: np.ndarray) -> np.ndarray:
        """Return float32 [units, m]: the columns that two runtimes must give alike."""

    def decide(self, answers: np.ndarray) -> np.ndarray:
        """Return [units, …]: what the model says."""

    def agree(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return bool [units]: where two answers say the same."""
        return np.asarray(self.decide(one) == self.decide(other))

    def lead(self, answers: np.ndarray) -> np.ndarray:
        """Return float32 [units]: how far what it says is ahead of the next, in logits."""

    def per_row_score(self, answers: np.ndarray, truth: Truth) -> np.ndarray:
        """Return the metric text by text, float64 [texts], higher is better: what gates compare in pairs."""

    def per_row_counts(self, answers: np.ndarray, truth: Truth) -> np.ndarray:
        """Return numbers [texts, k] of each text alone, which are the same where it is judged the same."""
        return self.per_row_score(answers, truth)[:, None]

    def weigh_counts(self, counts: np.ndarray) -> np.ndarray:
        """Return `per_row_score` of what `per_row_counts` has returned."""
        return np.asarray(counts[:, 0])

    def score(self, answers: np.ndarray, truth: Truth) -> dict[str, Any]:
        """Return `metric`, `<metric>_interval` (95 %), n (texts) and what else is worth knowing."""

    def confirms(self, told: Sequence[dict[str, Any]], answers: np.ndarray, truth: Truth, tolerance: float) -> bool:
        """Tell whether `job predict` has told of each text what `answers` say, but for close calls."""

    def min_rows(self, max_drop: float) -> int:
        """Return the fewest test rows on which a drop of at most `max_drop` can be proved, by the rule of three."""
        return count_rows(max_drop)


def cut_text(tokenizer: Any, text: str, max_tokens: int) -> str:
    """Return the beginning of a text that is at most so many tokens; `tokenizer`: a fast one of transformers."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return cut_at(text, spans, max_tokens)


def cut_at(text: str, spans: Sequence[Sequence[int]], max_tokens: int) -> str:
    """Return the beginning of a text whose tokens stand at `spans` in it, at most so many of them."""
    return text[: spans[max_tokens - 1][1]] if len(spans) > max_tokens else text


def join_outputs(task: Task, outputs: Mapping[str, Any]) -> Any:
    """Return the task's logits, torch's or numpy's, of a model's outputs by name; several are stacked last."""
    parts = [outputs[name] for name in task.outputs]
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.stack(parts, axis=-1)
    import torch

    return torch.stack(parts, dim=-1)
