"""Token tables: one split, tokenized once per node, on disk, cached by content.

A table is a folder of flat numpy arrays that every process maps into memory: IMDB takes 13 MB
where padded int64 rows take 205 MB.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from job.errors import DataError
from job.recipe.schema import hash_json
from job.tasks import IGNORED_LABEL, Examples, Task, Truth

_VERSION = 4


@dataclass(frozen=True)
class TokenTable:
    """One tokenized split.

    tokens uint16/uint32 [all tokens], types uint8 [all tokens] or None (segment of sentence pairs), offsets int64
    [rows + 1], labels int64 [rows], int32 [all tokens] where `per_token`, float32 [rows] where they are numbers, [rows,
    labels] where they are sets, rows int64 [rows] (row numbers in the source; a long text may have become several
    rows), spans int32 [all tokens, 2] or None (characters of a token in the text that answers are taken from), about:
    what the task has said of the split.
    """

    tokens: np.ndarray
    types: np.ndarray | None
    offsets: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    per_token: bool = False
    spans: np.ndarray | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)

    def pad(self, positions: np.ndarray, pad_id: int) -> dict[str, np.ndarray]:
        """Return rows as int64 [len(positions), longest] input_ids, attention_mask and, for pairs, token_type_ids."""
        lengths = self.lengths[positions]
        shape = (len(positions), int(lengths.max()))
        batch = {"input_ids": np.full(shape, pad_id, dtype=np.int64), "attention_mask": np.zeros(shape, dtype=np.int64)}
        if self.types is not None:
            batch["token_type_ids"] = np.zeros(shape, dtype=np.int64)
        for line, span in enumerate(self._spans(positions)):
            length = span.stop - span.start
            batch["input_ids"][line, :length] = self.tokens[span]
            batch["attention_mask"][line, :length] = 1
            if self.types is not None:
                batch["token_type_ids"][line, :length] = self.types[span]
        return batch

    def pad_labels(self, positions: np.ndarray) -> np.ndarray:
        """Return labels [len(positions), …], int64 or float32, and [len(positions), longest] of tokens."""
        if not self.per_token:
            return np.array(self.labels[positions])
        labels = np.full((len(positions), int(self.lengths[positions].max())), IGNORED_LABEL, dtype=np.int64)
        for line, span in enumerate(self._spans(positions)):
            labels[line, : span.stop - span.start] = self.labels[span]
        return labels

    @property
    def truth(self) -> Truth:
        """Return the labels that answers are held against; the rows that one text became count as one."""
        labels = np.array(self.labels)
        texts = np.unique(self.rows, return_inverse=True)[1]
        about = dict(self.about)
        if self.spans is not None:
            about["spans"] = [self.spans[span] for span in self._spans(np.arange(len(self)))]
        if self.per_token:
            labels = labels[labels != IGNORED_LABEL].astype(np.int64)
        return Truth(labels, texts[self.unit_positions], about)

    @property
    def unit_positions(self) -> np.ndarray:
        """Return int64 [units]: the position of each unit's row."""
        if not self.per_token:
            return np.arange(len(self))
        return np.repeat(np.arange(len(self)), self.lengths)[np.asarray(self.labels) != IGNORED_LABEL]

    def take(self, positions: np.ndarray) -> TokenTable:
        """Return a small table, in memory, of the rows at `positions` (int64), ascending."""
        spans = self._spans(positions)
        flat = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        about = dict(self.about)
        if "texts" in about:
            texts = np.unique(self.rows, return_inverse=True)[1]
            about["texts"] = [about["texts"][text] for text in np.unique(texts[positions])]
        return TokenTable(
            self.tokens[flat],
            self.types[flat] if self.types is not None else None,
            np.cumsum([0, *(span.stop - span.start for span in spans)], dtype=np.int64),
            self.labels[flat if self.per_token else positions],
            self.rows[positions],
            self.per_token,
            self.spans[flat] if self.spans is not None else None,
            about,
        )

    def head(self, rows: int, tokens: int) -> TokenTable:
        """Return the first rows, each cut to its first tokens, of a table whose tokens have labels."""
        lengths = np.minimum(self.lengths[:rows], tokens)
        kept = np.concatenate(
            [np.arange(start, start + length) for start, length in zip(self.offsets, lengths, strict=False)]
        )
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        kept_rows = {"offsets": offsets, "labels": self.labels[kept], "rows": self.rows[:rows]}
        return replace(self, tokens=self.tokens[kept], types=None, **kept_rows)

    def gather(self, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Return answers float32 [units, k] in the table's order from (positions, answers [rows, …, k]) of batches.

        Every row must come once; answers to padding and to tokens without a label are left out.
        """
        rows: list[np.ndarray] = [np.empty(0)] * len(self)
        for positions, answers in parts:
            asked = self.pad_labels(positions) != IGNORED_LABEL
            for line, position in enumerate(positions):
                rows[position] = answers[line][asked[line]] if self.per_token else answers[line][None]
        return np.concatenate(rows).astype(np.float32)

    def _spans(self, positions: np.ndarray) -> list[slice]:
        return [slice(self.offsets[position], self.offsets[position + 1]) for position in positions]

    @staticmethod
    def open(folder: Path) -> TokenTable:
        """Map a table that `tokenize_split` wrote."""

        def load(name: str) -> np.ndarray:
            return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

        types = load("types") if (folder / "types.npy").exists() else None
        per_token = (folder / "token_labels.npy").exists()
        labels = load("token_labels" if per_token else "labels")
        spans = load("spans") if (folder / "spans.npy").exists() else None
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        return TokenTable(load("tokens"), types, load("offsets"), labels, load("rows"), per_token, spans, about)

    @staticmethod
    def measure_cut(folder: Path) -> float:
        """Return the share of a table's rows that lost tokens to `max_length`."""
        return round(float(np.load(folder / "cut.npy", allow_pickle=False).mean()), 4)


@dataclass(frozen=True)
class Encoder:
    """How texts of a task become rows: with a fast transformers tokenizer, of at most `max_length` tokens."""

    task: Task
    tokenizer: Any
    max_length: int


def tokenize_split(examples: Examples, encoder: Encoder, cache: Path) -> Path:
    """Tokenize a split, or find it in the cache; return the table's folder. Raises DataError where no row is left."""
    how = [encoder.task.name, encoder.tokenizer.eos_token_id, encoder.max_length]
    key = hash_json([_VERSION, examples.fingerprint, hash_tokenizer(encoder.tokenizer), *how])
    folder = cache / "tokens" / key
    if not folder.exists():
        partial = folder.with_name(f"{key}.{uuid.uuid4().hex}.partial")
        partial.mkdir(parents=True)
        _write_table(examples, encoder, partial)
        try:
            os.rename(partial, folder)
        except OSError:  # another process of this node was faster; its table is the same
            shutil.rmtree(partial)
    return folder


def hash_tokenizer(tokenizer: Any) -> str:
    """Return the sha256 (hex) of everything that decides which ids a text gets; not which ends it.

    Truncation and padding are left out: each call of the tokenizer changes them in place.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return hash_json({key: value for key, value in state.items() if key not in ("truncation", "padding")})


def _write_table(examples: Examples, encoder: Encoder, folder: Path) -> None:
    rows = list(encoder.task.encode(encoder.tokenizer, examples, encoder.max_length))
    if not rows:
        raise DataError("data: no text has a token to learn from; give longer texts")
    narrow = np.uint16 if len(encoder.tokenizer) <= 1 << 16 else np.uint32
    _save(folder, "tokens", np.concatenate([np.asarray(row.ids, dtype=narrow) for row in rows]))
    _save(folder, "offsets", np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int64))
    _save(folder, "rows", examples.rows[[row.place for row in rows]])
    _save(folder, "cut", np.array([row.cut for row in rows]))
    if encoder.task.per_token:
        _save(folder, "token_labels", np.concatenate([np.asarray(row.labels, dtype=np.int32) for row in rows]))
    else:
        _save(folder, "labels", np.array([row.labels for row in rows], dtype=encoder.task.label_type))
    if rows[0].spans is not None:
        _save(folder, "spans", np.concatenate([np.asarray(row.spans, dtype=np.int32) for row in rows]))
    (folder / "about.json").write_text(json.dumps(encoder.task.describe(encoder.tokenizer, examples)), encoding="utf-8")
    if rows[0].types is not None:
        _save(folder, "types", np.concatenate([np.asarray(row.types, dtype=np.uint8) for row in rows]))


def _save(folder: Path, name: str, array: np.ndarray) -> None:
    np.save(folder / f"{name}.npy", array, allow_pickle=False)
