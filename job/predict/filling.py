"""A masked language model's answers: the tokens that stand where a text has masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding

from job.errors import DataError, NoValidCheckpoint
from job.predict.reader import Reader
from job.predict.tokens import Text
from job.tasks import Task, share_out


class Filler(Reader):
    """Answers {"text", "filled"}: of each mask, in order, {token, id, score, start, end} of the likeliest token."""

    def __init__(self, folder: Path, precision: str, threads: int, task: Task) -> None:
        super().__init__(folder, precision, threads, task)
        if self.tokenizer.mask_id is None:
            raise NoValidCheckpoint(f"{folder}: its tokenizer names no mask_token; export the bundle again")
        self._vocabulary = int(self.config.get("vocab_size", 0))

    def count_logits(self) -> int:
        """Return the size of the vocabulary."""
        return self._vocabulary

    def encode(self, texts: Sequence[Text], start: int) -> list[list[Encoding]]:
        """Return the rows of each text; raise DataError (11) for one without a mask."""
        for row, text in enumerate(texts, start):
            if not isinstance(text, str) or self.tokenizer.mask not in text:
                raise DataError(f"text {row}: has no {self.tokenizer.mask}; write it where a word is to be filled in")
        return [[encoding, *encoding.overflowing] for encoding in self.tokenizer.encode(texts)]

    def answer(self, text: Text, rows: Sequence[tuple[Encoding, np.ndarray]]) -> dict[str, Any]:
        """Return the answer to one text."""
        filled = []
        for encoding, logits in rows:
            for place in np.flatnonzero(np.array(encoding.ids) == self.tokenizer.mask_id):
                best = int(logits[place].argmax())
                score, (start, end) = float(share_out(logits[place])[best]), encoding.offsets[place]
                token = self.tokenizer.decode([best]).strip()
                filled.append({"token": token, "id": best, "score": round(score, 6), "start": start, "end": end})
        return {"text": text, "filled": filled}
