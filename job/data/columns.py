"""Rows to examples: columns by name, texts checked, labels mapped to ids.

Strict by default: the first bad rows are named by number and reason. With `data.max_bad_fraction`
bad rows are set aside and counted instead. Row numbers count from 1 within the split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from job.errors import DataError
from job.recipe.schema import Data

MAX_TEXT_CHARACTERS = 1_000_000
_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class Examples:
    """`texts` and `pairs` (None for single texts) as strings, `labels` int64 ids, `rows` int64 source row numbers.

    Of prompts and completions the pairs are the completions. Where labels are no classes, all ids are 0.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: np.ndarray
    rows: np.ndarray
    set_aside: int = 0

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
        )

    @property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of rows, labels and texts in order: the content, whatever file it came from."""
        digest = hashlib.sha256(self.labels.tobytes() + self.rows.tobytes())
        for column in (self.texts, self.pairs or []):
            for text in column:
                encoded = text.encode()
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()


@dataclass(frozen=True)
class RawColumns:
    """One split's columns as they stand in the source, and the label names its schema declares, if any.

    `columns` are our names of texts and pairs.
    """

    split: str
    columns: tuple[str, str]
    texts: Sequence[Any]
    pairs: Sequence[Any] | None
    labels: Sequence[Any] | None
    declared: list[str] | None


def pick_columns(rows: Any, data: Data, split: str) -> RawColumns:
    """Return the recipe's columns of a `datasets.Dataset`; raise DataError for one that does not exist."""
    for ours, theirs in data.columns.items():
        if theirs not in rows.column_names:
            raise DataError(
                f"data.columns.{ours}: column {theirs!r} is not in split {split!r} of {data.source!r} "
                f"(it has {', '.join(map(repr, rows.column_names))}); correct data.columns"
            )
    if len(rows) == 0:
        raise DataError(f"data: split {split!r} of {data.source!r} has no rows; give it some")
    columns: dict[str, str] = {str(ours): theirs for ours, theirs in data.columns.items()}
    first, second = ("prompt", "completion") if "prompt" in columns else ("text", "text_pair")
    pair, label = columns.get(second), columns.get("label")
    return RawColumns(
        split,
        (first, second),
        list(rows[columns[first]]),
        list(rows[pair]) if pair else None,
        list(rows[label]) if label else None,
        list(getattr(rows.features[label], "names", None) or []) or None if label else None,
    )


class LabelMap:
    """Maps the source's label values to ids. `names[id]` is the label that is released."""

    def __init__(self, names: list[str], ids: dict[str, int]) -> None:
        self.names = names
        self._ids = ids

    def find(self, value: Any) -> int | None:
        """Return the id of a source value (name or number), or None outside the map."""
        return self._ids.get(_canonical(value))

    @staticmethod
    def build(data: Data, train: RawColumns, model_names: list[str] | None) -> LabelMap:
        """Decide names and order: the recipe's, else the source's own, else the values found in train.

        Where `model_names` (the id2label of a model that was fine-tuned before) are the same words, or
        the values are plain numbers 0…k−1, the model's ids and names are kept, so that its head stays valid.
        """
        if train.labels is None:
            return LabelMap([], {})
        values, names = _name_values(data, train)
        if model_names and names == values == [str(index) for index in range(len(model_names))]:
            names = model_names
        order = _order_names(list(dict.fromkeys(names)), model_names)
        if len(order) < 2:
            raise DataError(
                f"data: split {train.split!r} has the single label {', '.join(map(repr, order))}; "
                "classification needs at least two"
            )
        ids = {value: order.index(name) for value, name in zip(values, names, strict=True)}
        ids |= {name: index for index, name in enumerate(order) if name not in ids}
        return LabelMap(order, ids)


def _order_names(names: list[str], model_names: list[str] | None) -> list[str]:
    """Return `names` in the model's order where both have the same words, else as they are."""
    theirs = [name.casefold() for name in model_names or []]
    if sorted(theirs) != sorted(name.casefold() for name in names):
        return names
    return sorted(names, key=lambda name: theirs.index(name.casefold()))


def _name_values(data: Data, train: RawColumns) -> tuple[list[str], list[str]]:
    """Return (source values, their names), same length."""
    if isinstance(data.labels, dict):
        return [_canonical(key) for key in data.labels], [str(name) for name in data.labels.values()]
    if data.labels is None and train.declared is None:
        found = _find_values(train)
        ordered = sorted(
            found, key=lambda value: (not _is_number(value), float(value) if _is_number(value) else 0, value)
        )
        return ordered, ordered
    names = [str(name) for name in (data.labels or train.declared or [])]
    found = _find_values(train)
    if found <= {"false", "true"} and len(names) == 2 and not found & set(names):
        return ["false", "true"], names
    if all(map(_is_number, found)) and not any(map(_is_number, names)):
        return [str(index) for index in range(len(names))], names
    return names, names


def _find_values(train: RawColumns) -> set[str]:
    return {_canonical(value) for value in train.labels or () if not _is_missing(value)}


def check_rows(raw: RawColumns, labels: LabelMap, data: Data) -> Examples:
    """Return the good rows of a split; raise DataError naming the bad ones beyond `max_bad_fraction`."""
    ids = [0] * len(raw.texts) if raw.labels is None else [labels.find(value) for value in raw.labels]
    problems = {
        index: problem
        for index in range(len(raw.texts))
        if (problem := _find_problem(raw, index, ids[index], labels.names))
    }
    refuse_beyond(len(problems), len(raw.texts), data, _list_problems(raw.split, problems))
    good = [index for index in range(len(raw.texts)) if index not in problems]
    return Examples(
        [_as_text(raw.texts[index]) or "" for index in good],
        [_as_text(raw.pairs[index]) or "" for index in good] if raw.pairs else None,
        np.array([ids[index] for index in good], dtype=np.int64),
        np.array(good, dtype=np.int64) + 1,
        len(problems),
    )


def refuse_beyond(bad: int, total: int, data: Data, what: str) -> None:
    """Raise DataError unless `bad` of `total` rows are within data.max_bad_fraction."""
    if bad > data.max_bad_fraction * total:
        needed = math.ceil(10_000 * bad / total) / 10_000
        way_out = f", or set them aside with data.max_bad_fraction: {needed:g} (now {data.max_bad_fraction:g})"
        # beyond a tenth it is the recipe that is wrong, not the rows
        raise DataError(
            f"data: {what}; correct the rows" + (way_out if needed <= 0.1 else ", data.labels or data.columns")
        )


def _list_problems(split: str, problems: dict[int, str]) -> str:
    shown = "; ".join(f"row {index + 1}: {problem}" for index, problem in list(problems.items())[:_SHOWN_PROBLEMS])
    more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    return f"split {split!r} has {len(problems)} bad row{'s' * (len(problems) > 1)} ({shown}{more})"


def _find_problem(raw: RawColumns, index: int, label: int | None, names: list[str]) -> str | None:
    for column, values in zip(raw.columns, (raw.texts, raw.pairs), strict=True):
        problem = _find_text_problem(values[index]) if values is not None else None
        if problem:
            return f"{column} {problem}"
    if label is None and raw.labels is not None:
        value = raw.labels[index]
        if _is_missing(value):
            return "label is missing"
        return f"label {str(value)[:40]!r} is not one of {', '.join(map(repr, names[:10]))}"
    return None


def _find_text_problem(value: Any) -> str | None:
    text = _as_text(value)
    if text is None:
        return f"is {type(value).__name__}, not a string"
    if not text.strip():
        return "is empty"
    if "\x00" in text:
        return "holds a NUL character"
    if len(text) > MAX_TEXT_CHARACTERS:
        return f"has {len(text):,} characters (at most {MAX_TEXT_CHARACTERS:,})"
    return None


def _as_text(value: Any) -> str | None:
    """Numbers are texts too: a CSV column of years is read as int."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not _is_missing(value):
        return str(value)
    return value if isinstance(value, str) else None


def _canonical(value: Any) -> str:
    """One spelling for 1, 1.0 and "1", and for True and "true"; other strings are stripped."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _is_missing(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
