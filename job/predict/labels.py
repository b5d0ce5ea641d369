"""From texts to labels with one ONNX Runtime session on the processor.

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
from job.predict.tokens import BundleTokenizer, Text, check_text, read_json

_WINDOW_ROWS = 4096  # texts tokenized and sorted at a time, so that memory does not grow with the input
_MAX_TOKENS = 8192  # of a micro-batch, padding included


class Classifier:
    """A text classifier: tokenizer and ONNX model of one local bundle folder, on `threads` (0: all) processors.

    Raises NoValidCheckpoint (17) for files that do not load.
    """

    bench_rows = 1024

    def __init__(self, folder: Path, precision: str, threads: int) -> None:
        config = read_json(folder / "config.json")
        self._labels = _read_labels(config, folder)
        self._tokenizer = BundleTokenizer(folder, config)
        self.model_path = folder / choose_model(list_bundle(folder), precision, str(folder))
        self.threads = count_threads(threads)
        self._session = open_session(self.model_path, self.threads)
        self._inputs = [item.name for item in self._session.get_inputs()]
        unknown = [name for name in self._inputs if name not in self._tokenizer.columns]
        if unknown:
            raise NoValidCheckpoint(
                f"{self.model_path}: asks for the input {unknown[0]!r}; a text classifier asks for no more than "
                f"{', '.join(self._tokenizer.columns)}, export it again"
            )

    def predict(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        """Return one {"text", "label", "score", "scores"} for each text (or pair), in the order given.

        `score` is the probability of `label`, `scores` maps every label to its own, rounded to 6 digits.
        An empty text is allowed. Raises DataError (11) naming a row that is no text.
        """
        for row, text in enumerate(texts):
            check_text(text, row)
        answers: list[dict[str, Any]] = []
        for start in range(0, len(texts), _WINDOW_ROWS):
            window = texts[start : start + _WINDOW_ROWS]
            answers += [self._answer(text, row) for text, row in zip(window, self._compute_logits(window), strict=True)]
        return answers

    def stream(self, texts: Iterable[Text]) -> Iterator[dict[str, Any]]:
        """Yield an answer for each text as `predict` does; so many are read at a time that like lengths meet."""
        source = iter(texts)
        while window := list(islice(source, _WINDOW_ROWS)):
            yield from self.predict(window)

    def _compute_logits(self, texts: Sequence[Text]) -> list[np.ndarray]:
        """Return float64 [labels] for each text."""
        encodings = self._tokenizer.encode(texts)
        logits: list[np.ndarray] = [np.empty(0)] * len(texts)
        for rows in _group_by_length([len(encoding.ids) for encoding in encodings], self._tokenizer.max_rows):
            for row, values in zip(rows, self._run([encodings[row] for row in rows]), strict=True):
                logits[row] = values
        return logits

    def _run(self, encodings: Sequence[Encoding]) -> np.ndarray:
        """Return float64 [rows, labels] of one micro-batch."""
        arrays = self._tokenizer.pad(encodings)
        try:
            logits = np.asarray(self._session.run(None, {name: arrays[name] for name in self._inputs})[0], np.float64)
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise NoValidCheckpoint(f"{self.model_path}: {first_line(error)}; export the model again") from None
        if logits.shape != (len(encodings), len(self._labels)):
            raise NoValidCheckpoint(
                f"{self.model_path}: gives {logits.shape} for {len(encodings)} texts, config.json names "
                f"{len(self._labels)} labels; they do not belong together, export the model again"
            )
        if not np.isfinite(logits).all():
            raise NoValidCheckpoint(f"{self.model_path}: answers NaN or Inf; train or export the model again")
        return logits

    def _answer(self, text: Text, logits: np.ndarray) -> dict[str, Any]:
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        scores = {label: round(float(share), 6) for label, share in zip(self._labels, shares, strict=True)}
        best = self._labels[int(logits.argmax())]
        return {"text": text, "label": best, "score": scores[best], "scores": scores}


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


def _read_labels(config: dict[str, Any], folder: Path) -> list[str]:
    """Return the label names in the order of the logits; transformers leaves out the default two."""
    named = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    try:
        return [str(named[str(index)]) for index in range(len(named))]
    except (KeyError, TypeError):
        raise NoValidCheckpoint(
            f"{folder / 'config.json'}: id2label: must map '0', '1', … to names; export the bundle again"
        ) from None
