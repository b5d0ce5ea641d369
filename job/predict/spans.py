"""A question answerer's answers: the words of a context that answer a question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding

from job.errors import DataError
from job.predict.reader import Reader
from job.predict.tokens import Text
from job.tasks import SpanColumn, Task, Window, cut_at, find_spans, measure_question, measure_stride, share_out


class Answerer(Reader):
    """Answers {"text", "answer", "start", "end", "score"} to (question, context): characters of the context.

    `answer` is "" where the model was trained on questions without one and finds none.
    """

    bench_rows = 256

    def __init__(self, folder: Path, precision: str, threads: int, task: Task) -> None:
        super().__init__(folder, precision, threads, task)
        self._max_length = self.tokenizer.cut_second(measure_stride)
        options = self.config.get("task_specific_params")
        told = options.get(task.name) if isinstance(options, dict) else None
        self._may_be_none = isinstance(told, dict) and bool(told.get("handle_impossible_answer"))

    def count_logits(self) -> int:
        """Return two: of a first and of a last token."""
        return 2

    def encode(self, texts: Sequence[Text], start: int) -> list[list[Encoding]]:
        """Return the windows of each question over its context."""
        pairs = []
        for row, text in enumerate(texts, start):
            if isinstance(text, str):
                raise DataError(f"text {row}: has no context; give a question and a context (a pair, see --pairs)")
            spans = self.tokenizer.find_spans(text[0])
            pairs.append((cut_at(text[0], spans, measure_question(self._max_length)), text[1]))
        return [[encoding, *encoding.overflowing] for encoding in self.tokenizer.encode(pairs)]

    def answer(self, text: Text, rows: Sequence[tuple[Encoding, np.ndarray]]) -> dict[str, Any]:
        """Return the answer to one question: the best of all windows."""
        windows = [_find_window(encoding) for encoding, _ in rows]
        found = np.concatenate([find_spans(r[1][None], window) for r, window in zip(rows, windows, strict=True)])
        best = int(found[:, SpanColumn.BEST].argmax())
        encoding, logits = rows[best]
        first, last = (int(found[best, column]) for column in (SpanColumn.FIRST, SpanColumn.LAST))
        none = self._may_be_none and found[:, SpanColumn.NONE].min() >= found[best, SpanColumn.BEST]
        if none or not last:
            best, first, last = int(found[:, SpanColumn.NONE].argmin()), 0, 0
            encoding, logits = rows[best]
        start, end = (encoding.offsets[first][0], encoding.offsets[last][1]) if last else (0, 0)
        said = text[1][start:end]
        start += len(said) - len(said.lstrip())
        window = windows[best]
        allowed = [0, *range(int(window.context[0]), int(window.end[0]))]
        shares = [dict(zip(allowed, share_out(logits[allowed, part]), strict=True)) for part in (0, 1)]
        score = round(float(shares[0][first] * shares[1][last]), 6)
        return {"text": text, "answer": said.strip(), "start": start, "end": start + len(said.strip()), "score": score}


def _find_window(encoding: Encoding) -> Window:
    """Return where answers may stand in a row, as int64 [1] each."""
    inside = [token for token, part in enumerate(encoding.sequence_ids) if part == 1]
    nothing = np.zeros(1, dtype=np.int64)
    context, end = (np.array([place]) for place in ((inside[0], inside[-1] + 1) if inside else (0, 0)))
    return Window(context, end, nothing, nothing)
