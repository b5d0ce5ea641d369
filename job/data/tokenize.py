"""Token tables: one split, tokenized once per node, on disk, cached by content.

A table is a folder of flat numpy arrays that every process maps into memory: IMDB takes 13 MB
where padded int64 rows take 205 MB.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from job.data.columns import Examples
from job.recipe.schema import hash_json

_BATCH_ROWS = 1000
_VERSION = 2


@dataclass(frozen=True)
class TokenTable:
    """One tokenized split.

    tokens uint16/uint32 [all tokens], types uint8 [all tokens] or None (segment of sentence pairs),
    offsets int64 [rows + 1], labels int64 [rows], rows int64 [rows] (row numbers in the source).
    """

    tokens: np.ndarray
    types: np.ndarray | None
    offsets: np.ndarray
    labels: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

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
        for line, (position, length) in enumerate(zip(positions, lengths, strict=True)):
            span = slice(self.offsets[position], self.offsets[position] + length)
            batch["input_ids"][line, :length] = self.tokens[span]
            batch["attention_mask"][line, :length] = 1
            if self.types is not None:
                batch["token_type_ids"][line, :length] = self.types[span]
        return batch

    @staticmethod
    def open(folder: Path) -> TokenTable:
        """Map a table that `tokenize_split` wrote."""

        def load(name: str) -> np.ndarray:
            return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

        types = load("types") if (folder / "types.npy").exists() else None
        return TokenTable(load("tokens"), types, load("offsets"), load("labels"), load("rows"))


def tokenize_split(examples: Examples, tokenizer: Any, max_length: int, cache: Path) -> Path:
    """Tokenize a split, or find it in the cache; return the table's folder.

    `tokenizer` is a fast transformers tokenizer; longer texts are cut to `max_length` tokens.
    """
    key = hash_json([_VERSION, examples.fingerprint, hash_tokenizer(tokenizer), max_length])
    folder = cache / "tokens" / key
    if not folder.exists():
        partial = folder.with_name(f"{key}.{uuid.uuid4().hex}.partial")
        partial.mkdir(parents=True)
        _write_table(examples, tokenizer, max_length, partial)
        try:
            os.rename(partial, folder)
        except OSError:  # another process of this node was faster; its table is the same
            shutil.rmtree(partial)
    return folder


def hash_tokenizer(tokenizer: Any) -> str:
    """Return the sha256 (hex) of everything that decides which ids a text gets.

    Truncation and padding are left out: each call of the tokenizer changes them in place.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return hash_json({key: value for key, value in state.items() if key not in ("truncation", "padding")})


def _write_table(examples: Examples, tokenizer: Any, max_length: int, folder: Path) -> None:
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    for start in range(0, len(examples), _BATCH_ROWS):
        span = slice(start, start + _BATCH_ROWS)
        texts = (examples.texts[span], examples.pairs[span]) if examples.pairs else (examples.texts[span],)
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, padding=False)
        ids += [np.asarray(row, dtype=np.uint32) for row in encoded["input_ids"]]
        types += [np.asarray(row, dtype=np.uint8) for row in encoded.get("token_type_ids", [])]
    narrow = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    _save(folder, "tokens", np.concatenate(ids).astype(narrow))
    _save(folder, "offsets", np.cumsum([0, *map(len, ids)], dtype=np.int64))
    _save(folder, "labels", examples.labels)
    _save(folder, "rows", examples.rows)
    if examples.pairs and types:
        _save(folder, "types", np.concatenate(types))


def _save(folder: Path, name: str, array: np.ndarray) -> None:
    np.save(folder / f"{name}.npy", array, allow_pickle=False)
