"""From texts to what a model that reads says of each, with one ONNX Runtime session on the processor.

Rows are computed in micro-batches of like length, padded to the longest of each, and given back in
the order they came. An int8 model quantizes its activations per micro-batch, so its probabilities
may shift slightly with the company that a row is in; those of fp32 do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding

from job.errors import NoValidCheckpoint
from job.predict.bundle import choose_model, list_bundle
from job.predict.runtime import count_threads, first_line, open_session
from job.predict.tokens import BundleTokenizer, Input, Text, check_text, read_json
from job.tasks import Task, join_outputs

_WINDOW_ROWS = 4096  # texts tokenized and sorted at a time, so that memory does not grow with the input
_MAX_TOKENS = 8192  # of a micro-batch, padding included


class Reader:
    """Tokenizer and ONNX model of one local bundle folder, on `threads` (0: all) processors; its heirs say what.

    Raises NoValidCheckpoint (17) for files that do not load.
    """

    bench_rows = 1024

    def __init__(self, folder: Path, precision: str, threads: int, task: Task) -> None:
        self.config, self.task = read_json(folder / "config.json"), task
        self.tokenizer = BundleTokenizer(folder, self.config)
        self.model_path = folder / choose_model(list_bundle(folder), precision, str(folder))
        self.threads = count_threads(threads)
        self._session = open_session(self.model_path, self.threads)
        self._inputs = [item.name for item in self._session.get_inputs()]
        unknown = [name for name in self._inputs if name not in self.tokenizer.columns]
        if unknown:
            raise NoValidCheckpoint(
                f"{self.model_path}: asks for the input {unknown[0]!r}; a model for {task.name} asks for no more than "
                f"{', '.join(self.tokenizer.columns)}, export it again"
            )

    def encode(self, texts: Sequence[Text], start: int) -> list[list[Encoding]]:
        """Return the rows of tokens that each text becomes; `start` is the place of the first among all texts."""
        return [[encoding] for encoding in self.tokenizer.encode(texts)]

    def answer(self, text: Text, rows: Sequence[tuple[Encoding, np.ndarray]]) -> dict[str, Any]:
        """Return what is said of a text whose rows have these logits, float64 [labels] or [tokens, labels]."""
        raise NotImplementedError

    def predict(self, texts: Sequence[Input]) -> list[dict[str, Any]]:
        """Return an answer for each text (or pair), in the order given; raise DataError (11) naming one that is none.

        An empty text is allowed.
        """
        return list(self.stream(texts))

    def stream(self, texts: Iterable[Input]) -> Iterator[dict[str, Any]]:
        """Yield an answer for each text as `predict` does; so many are read at a time that like lengths meet."""
        source, start = iter(texts), 0
        while window := list(islice(source, _WINDOW_ROWS)):
            checked = [check_text(text, row) for row, text in enumerate(window, start)]
            for text, rows in zip(checked, self._compute(checked, start), strict=True):
                yield self.answer(text, rows)
            start += len(window)

    def _compute(self, texts: Sequence[Text], start: int) -> Iterator[list[tuple[Encoding, np.ndarray]]]:
        """Yield for each text its rows with their logits; `start` as in `encode`."""
        encoded = self.encode(texts, start)
        rows = [encoding for encodings in encoded for encoding in encodings]
        logits: list[np.ndarray] = [np.empty(0)] * len(rows)
        for group in _group_by_length([len(encoding.ids) for encoding in rows], self.tokenizer.max_rows):
            for row, values in zip(group, self._run([rows[row] for row in group]), strict=True):
                logits[row] = values
        done = iter(zip(rows, logits, strict=True))
        for encodings in encoded:
            yield list(islice(done, len(encodings)))

    def _run(self, encodings: Sequence[Encoding]) -> Iterator[np.ndarray]:
        """Yield the logits float64 of each row of one micro-batch, without those of padding."""
        arrays, names = self.tokenizer.pad(encodings), list(self.task.outputs)
        try:
            outputs = self._session.run(names, {name: arrays[name] for name in self._inputs})
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise NoValidCheckpoint(f"{self.model_path}: {first_line(error)}; export the model again") from None
        logits = np.asarray(join_outputs(self.task, dict(zip(names, outputs, strict=True))), np.float64)
        whole = self.task.per_token or self.task.per_window
        expected = arrays["input_ids"].shape if whole else (len(encodings),)
        if logits.shape[:-1] != expected or logits.shape[-1] != self.count_logits():
            raise NoValidCheckpoint(
                f"{self.model_path}: gives {logits.shape} for {len(encodings)} texts, config.json names "
                f"{self.count_logits()} labels; they do not belong together, export the model again"
            )
        if not np.isfinite(logits).all():
            raise NoValidCheckpoint(f"{self.model_path}: answers NaN or Inf; train or export the model again")
        for row, encoding in enumerate(encodings):
            yield logits[row, self.tokenizer.place(encoding, logits.shape[1])] if whole else logits[row]

    def count_logits(self) -> int:
        """Return how many logits a row, or a token, has."""
        raise NotImplementedError


def _group_by_length(lengths: Sequence[int], max_rows: int) -> Iterator[list[int]]:
    """Yield row numbers, shortest rows first, in groups of at most `max_rows` rows and _MAX_TOKENS tokens."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) == max_rows or (len(group) + 1) * lengths[row] > _MAX_TOKENS):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


class LabelReader(Reader):
    """A model with a logit for each label; `labels` are their names, in the order of the logits."""

    def __init__(self, folder: Path, precision: str, threads: int, task: Task) -> None:
        super().__init__(folder, precision, threads, task)
        self.labels = _read_labels(self.config)

    def count_logits(self) -> int:
        """Return the number of labels."""
        return len(self.labels)


def _read_labels(config: dict[str, Any]) -> list[str]:
    """Return the label names in the order of the logits; transformers leaves out the default two."""
    named = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    try:
        return [str(named[str(index)]) for index in range(len(named))]
    except (KeyError, TypeError):
        raise NoValidCheckpoint(
            "config.json: id2label: must map '0', '1', … to names; export the bundle again"
        ) from None
