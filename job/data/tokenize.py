"""Token tables: one split, tokenized once, cached by content: on disk, and large ones in the store for other nodes.

A table is a folder of flat numpy arrays that every process maps into memory: IMDB takes 13 MB
where padded int64 rows take 205 MB.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from job.errors import DataError
from job.recipe.schema import hash_json
from job.store.cached import SharedFolders
from job.store.manifest import hash_file, keep_digests, match_digests
from job.store.transfer import build_folder
from job.tasks import IGNORED_LABEL, Examples, Task, Truth

log = logging.getLogger("job.data")

_LIBRARIES = ("tokenizers", "transformers")
_DIGESTS = "digests.json"
"""File → sha256 of a table's files."""
_SHARED_CHARACTERS = 1 << 20
"""Texts that are worth a dozen requests: they take most of a second, where requests take a tenth."""


@dataclass(frozen=True)
class Widths:
    """How many tokens a padded row has: as the longest beside it, or more, up to a multiple, but `limit` at most."""

    multiple: int = 1
    limit: int = 0

    def fit(self, longest: int) -> int:
        """Return the tokens of every row of a batch whose longest has so many."""
        return max(longest, min(-(-longest // self.multiple) * self.multiple, self.limit))


AS_LONGEST = Widths()


@dataclass(frozen=True)
class TokenTable:
    """One tokenized split.

    tokens uint16/uint32 [all tokens], types uint8 [all tokens] or None (segment of sentence pairs), offsets int64
    [rows + 1], labels int64 [rows], int32 [all tokens] where `per_token`, float32 [rows] where they are numbers, [rows,
    labels] where they are sets, rows int64 [rows] (row numbers in the source; a long text may have become several
    rows), spans int32 [all tokens, 2] or None (characters of a token in the text that answers are taken from), about:
    what the task has said of the split. Where labels are the tokens of another text, its target,
    they have offsets of their own: label_offsets int64 [rows + 1].
    """

    tokens: np.ndarray
    types: np.ndarray | None
    offsets: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    per_token: bool = False
    spans: np.ndarray | None = None
    about: dict[str, Any] = field(default_factory=dict)
    label_offsets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows], those of its target included."""
        own = np.diff(self.offsets)
        return own if self.label_offsets is None else own + self.label_lengths

    @cached_property
    def label_lengths(self) -> np.ndarray:
        """Labels of each row whose tokens have labels, int64 [rows]."""
        return np.diff(self.offsets if self.label_offsets is None else self.label_offsets)

    def pad(self, positions: np.ndarray, pad_id: int, widths: Widths = AS_LONGEST) -> dict[str, np.ndarray]:
        """Return rows as int64 [len(positions), width] input_ids, attention_mask and, for pairs, token_type_ids.

        With targets also decoder_input_ids [len(positions), their width]: each label's token comes one place later.
        """
        lengths = np.diff(self.offsets)[positions]
        shape = (len(positions), widths.fit(int(lengths.max())))
        batch = {"input_ids": np.full(shape, pad_id, dtype=np.int64), "attention_mask": np.zeros(shape, dtype=np.int64)}
        if self.types is not None:
            batch["token_type_ids"] = np.zeros(shape, dtype=np.int64)
        for line, span in enumerate(self._spans(positions)):
            length = span.stop - span.start
            batch["input_ids"][line, :length] = self.tokens[span]
            batch["attention_mask"][line, :length] = 1
            if self.types is not None:
                batch["token_type_ids"][line, :length] = self.types[span]
        if self.label_offsets is not None:
            batch["decoder_input_ids"] = self._shift_right(self.pad_labels(positions, widths), pad_id)
        return batch

    def _shift_right(self, labels: np.ndarray, pad_id: int) -> np.ndarray:
        """Return what a decoder is given that is to foretell `labels`: the token that begins, then all but the last."""
        ids = np.full_like(labels, self.about["decoder_start_id"])
        ids[:, 1:] = np.where(labels[:, :-1] == IGNORED_LABEL, pad_id, labels[:, :-1])
        return ids

    def pad_labels(self, positions: np.ndarray, widths: Widths = AS_LONGEST) -> np.ndarray:
        """Return labels [len(positions), …], int64 or float32, and [len(positions), width] of tokens."""
        if not self.per_token:
            return np.array(self.labels[positions])
        width = widths.fit(int(self.label_lengths[positions].max()))
        labels = np.full((len(positions), width), IGNORED_LABEL, dtype=np.int64)
        for line, span in enumerate(self._label_spans(positions)):
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
        return np.repeat(np.arange(len(self)), self.label_lengths)[np.asarray(self.labels) != IGNORED_LABEL]

    def cut(self, positions: np.ndarray, max_tokens: int, max_rows: int | None = None) -> Iterator[np.ndarray]:
        """Yield positions of rows of like length, longest first; a batch that is over `max_tokens` has one row."""
        order = positions[np.argsort(-self.lengths[positions], kind="stable")]
        while len(order):
            count = min(max(max_tokens // int(self.lengths[order[0]]), 1), max_rows or len(order))
            yield order[:count]
            order = order[count:]

    def take(self, positions: np.ndarray) -> TokenTable:
        """Return a small table, in memory, of the rows at `positions` (int64), ascending."""
        spans = self._spans(positions)
        flat, labelled = _flatten(spans), self._label_spans(positions)
        about = dict(self.about)
        if "texts" in about:
            texts = np.unique(self.rows, return_inverse=True)[1]
            about["texts"] = [about["texts"][text] for text in np.unique(texts[positions])]
        return TokenTable(
            self.tokens[flat],
            self.types[flat] if self.types is not None else None,
            _add_up(spans),
            self.labels[_flatten(labelled) if self.per_token else positions],
            self.rows[positions],
            self.per_token,
            self.spans[flat] if self.spans is not None else None,
            about,
            _add_up(labelled) if self.label_offsets is not None else None,
        )

    def head(self, rows: int, tokens: int) -> TokenTable:
        """Return the first rows of a table whose tokens have labels, cut to their first ones, sources whole."""
        positions = np.arange(min(rows, len(self)))
        cut = [slice(span.start, min(span.stop, span.start + tokens)) for span in self._label_spans(positions)]
        spans, label_offsets = cut, None
        if self.label_offsets is not None:
            spans, label_offsets = self._spans(positions), _add_up(cut)
        kept = {"tokens": self.tokens[_flatten(spans)], "offsets": _add_up(spans), "labels": self.labels[_flatten(cut)]}
        return replace(self, types=None, rows=self.rows[positions], label_offsets=label_offsets, **kept)

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

    def _label_spans(self, positions: np.ndarray) -> list[slice]:
        offsets = self.offsets if self.label_offsets is None else self.label_offsets
        return [slice(offsets[position], offsets[position + 1]) for position in positions]

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
        own = load("label_offsets") if (folder / "label_offsets.npy").exists() else None
        return TokenTable(load("tokens"), types, load("offsets"), labels, load("rows"), per_token, spans, about, own)

    @staticmethod
    def measure_cut(folder: Path) -> float:
        """Return the share of a table's rows that lost tokens to `max_length`."""
        return round(float(np.load(folder / "cut.npy", allow_pickle=False).mean()), 4)


@dataclass(frozen=True)
class Encoder:
    """How texts of a task become rows: with a fast transformers tokenizer, of at most `max_length` tokens.

    `decoder_start_id`: the token that a decoder is given before the first one of a target; None where there are none.
    """

    task: Task
    tokenizer: Any
    max_length: int
    decoder_start_id: int | None = None


def tokenize_split(examples: Examples, encoder: Encoder, place: Path, shared: SharedFolders | None = None) -> Path:
    """Tokenize a split, or find it in the cache or in `shared`; return the table's folder.

    Raises DataError where no row is left.
    """
    key = hash_json([examples.fingerprint, *_describe(encoder)])
    folder = place / "tokens" / key
    if is_whole_table(folder):
        return folder
    with build_folder(folder) as partial:
        known = shared is not None and _is_worth(examples) and shared.fetch(key, partial)
        if known:
            log.info("took the tokens of %d texts from the store", len(examples))
        else:
            _write_table(examples, encoder, partial)
            keep_digests(partial, partial / _DIGESTS)
        if not is_whole_table(folder):
            shutil.rmtree(folder, ignore_errors=True)
    if shared is not None and not known and _is_worth(examples):
        shared.keep(key, folder)
    return folder


def is_whole_table(folder: Path) -> bool:
    """Tell whether a table lies there as it was written."""
    return match_digests(folder, folder / _DIGESTS)


def _describe(encoder: Encoder) -> list[Any]:
    """Return what decides which table a text becomes, beside the text."""
    tokenizer = encoder.tokenizer
    asked = [encoder.task.name, encoder.max_length, encoder.decoder_start_id]
    told = [tokenizer.model_input_names, tokenizer.truncation_side, tokenizer.chat_template]
    special = [tokenizer.special_tokens_map, tokenizer.eos_token_id]
    # other nodes may have other versions
    return [hash_tokenizer(tokenizer), *asked, *told, *special, *map(metadata.version, _LIBRARIES), _hash_code()]


@cache
def _hash_code() -> str:
    """Return the sha256 (hex) of the code that makes rows of texts."""
    here = Path(__file__)
    return hash_json([hash_file(path) for path in (here, *sorted((here.parents[1] / "tasks").glob("*.py")))])


def _is_worth(examples: Examples) -> bool:
    return sum(map(len, [*examples.texts, *(examples.pairs or [])])) >= _SHARED_CHARACTERS


def identify_tokenizer(tokenizer: Any, examples: Examples) -> str:
    """Return `hash_tokenizer`, with the chat template where examples may be conversations."""
    own = hash_tokenizer(tokenizer)
    return own if examples.targets is None or not tokenizer.chat_template else hash_json([own, tokenizer.chat_template])


def hash_tokenizer(tokenizer: Any) -> str:
    """Return the sha256 (hex) of everything that decides which ids a text gets; not which ends it.

    Truncation and padding are left out: each call of the tokenizer changes them in place.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return hash_json({key: value for key, value in state.items() if key not in ("truncation", "padding")})


def _write_table(examples: Examples, encoder: Encoder, folder: Path) -> None:
    rows = _encode(examples, encoder)
    if not rows:
        raise DataError("data: no text has a token to learn from; give longer texts")
    tokens = np.concatenate([np.asarray(row.ids, dtype=np.uint32) for row in rows])
    _save(folder, "tokens", tokens if tokens.max(initial=0) >> 16 else tokens.astype(np.uint16))
    _save(folder, "offsets", np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int64))
    _save(folder, "rows", examples.rows[[row.place for row in rows]])
    _save(folder, "cut", np.array([row.cut for row in rows]))
    if encoder.task.per_token:
        _save(folder, "token_labels", np.concatenate([np.asarray(row.labels, dtype=np.int32) for row in rows]))
    else:
        _save(folder, "labels", np.array([row.labels for row in rows], dtype=encoder.task.label_type))
    about = encoder.task.describe(encoder.tokenizer, examples)
    if encoder.decoder_start_id is not None:
        _save(folder, "label_offsets", np.cumsum([0, *(np.size(row.labels) for row in rows)], dtype=np.int64))
        about |= {"decoder_start_id": encoder.decoder_start_id}
    if rows[0].spans is not None:
        _save(folder, "spans", np.concatenate([np.asarray(row.spans, dtype=np.int32) for row in rows]))
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    if rows[0].types is not None:
        _save(folder, "types", np.concatenate([np.asarray(row.types, dtype=np.uint8) for row in rows]))


def _encode(examples: Examples, encoder: Encoder) -> list[Any]:
    try:
        return list(encoder.task.encode(encoder.tokenizer, examples, encoder.max_length))
    except BaseException as error:
        # how its library fails: by an Exception of no class of its own, or by Rust's panic, which is no Exception
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"model.id: its tokenizer cannot encode the texts ({error}); restore the tokenizer of this model"
        ) from None


def _flatten(spans: list[slice]) -> np.ndarray:
    return np.concatenate([np.arange(span.start, span.stop) for span in spans])


def _add_up(spans: list[slice]) -> np.ndarray:
    """Return the offsets of spans that are put one after the other."""
    return np.cumsum([0, *(span.stop - span.start for span in spans)], dtype=np.int64)


def _save(folder: Path, name: str, array: np.ndarray) -> None:
    save_array(folder / f"{name}.npy", array)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a file as `np.load` reads it; raise OSError where it does not fit on the disk.

    NumPy writes to what is opened with "wb" by stdio, and looks neither at its errno nor, at the end, whether the last
    block was written: of a small array nobody would hear. To what is opened for reading as well it writes by Python.
    """
    with path.open("w+b") as file:
        np.save(file, array, allow_pickle=False)
