"""Rows to examples: columns by name, texts checked, labels mapped to ids.

Strict by default: the first bad rows are named by number and reason. With `data.max_bad_fraction`
bad rows are set aside and counted instead. Row numbers count from 1 within the split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from job.data.targets import (
    has_answer,
    join_messages,
    join_words,
    list_labels,
    list_values,
    parse_json,
    read_answers,
    read_labels,
    read_messages,
    read_number,
    read_tags,
    spell_date,
)
from job.errors import DataError
from job.recipe.schema import Data, spell_label
from job.tasks import Examples

MAX_TEXT_CHARACTERS = 1_000_000
_SHOWN_PROBLEMS = 3
_FIRST = ("text", "prompt", "tokens", "question", "messages", "source")
_SECOND = ("text_pair", "completion", "context", "target")
_LABELS = ("label", "tags", "answers")
"""Our names of columns by what they are to a row; a recipe names at most one of each."""
_TARGETS = {"tags", "answers", "messages", "labels", "number"}
"""Columns by which a row is to be answered with more than an id."""
_KINDS_OF_LABELS = {"multi_label_classification": "labels", "regression": "number"}
"""What the column `label` is called from here on, where data.problem_type says that it holds no single names."""
_TRUTHS = {"false", "true"}
"""Values that programs spell with small and capital letters."""
_MAX_FRACTIONS = 20
"""So many different labels may be numbers with a fraction and yet names of classes: half stars, versions."""


@dataclass(frozen=True)
class RawColumns:
    """One split's columns as they stand in the source, and the label names its schema declares, if any.

    `columns` are our names of texts, pairs and labels (`labels` for lists of them, `number`), None for one that the
    task does not have.
    """

    split: str
    columns: tuple[str | None, str | None, str | None]
    texts: Sequence[Any]
    pairs: Sequence[Any] | None
    labels: Sequence[Any] | None
    declared: list[str] | None

    @property
    def named(self) -> bool:
        """Tell whether the labels are names, of rows or of words."""
        return self.columns[2] in ("label", "labels", "tags")

    def list_labels(self) -> list[Any]:
        """Return every label of every row."""
        split = {"tags": list_values, "labels": list_labels}.get(self.columns[2] or "")
        if split is None:
            return list(self.labels or ())
        labels = []
        for row in self.labels or ():
            with suppress(ValueError):  # said of the row when it is read
                labels += split(row)
        return labels


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
    first, second, label = (next(filter(columns.get, names), None) for names in (_FIRST, _SECOND, _LABELS))
    texts, pairs, labels = (_list_cells(rows, columns[key], split) if key else None for key in (first, second, label))
    declared = _find_names(rows.features[columns[label]]) if label else None
    if label == "label":
        label = _KINDS_OF_LABELS.get(data.problem_type, label)
    return RawColumns(split, (first, second, label), texts or [], pairs, labels, declared)


def _list_cells(rows: Any, column: str, split: str) -> list[Any]:
    """Return a column's cells. Those of JSON lines and parquet are bytes until now, which may be no text."""
    try:
        return list(rows[column])
    except UnicodeDecodeError as error:
        cells = rows.select_columns([column])
        row = next((row for row in range(len(cells)) if not _is_decodable(cells, row)), 0) + 1
        raise DataError(
            f"data: row {row} of split {split!r} is not UTF-8 ({error.reason}); convert the file (say, iconv -f "
            "WINDOWS-1252 -t UTF-8)"
        ) from None


def _is_decodable(rows: Any, row: int) -> bool:
    try:
        rows[row]
    except UnicodeDecodeError:
        return False
    return True


def _find_names(feature: Any) -> list[str] | None:
    """Return the label names that a column's type declares, of the column itself or of the lists in it."""
    return list(getattr(getattr(feature, "feature", feature), "names", None) or []) or None


class LabelMap:
    """Maps the source's label values to ids. `names[id]` is the label that is released."""

    def __init__(self, names: list[str], ids: dict[str, int]) -> None:
        self.names = names
        self._ids = ids
        self._truths = {value.casefold(): found for value, found in ids.items() if value.casefold() in _TRUTHS}

    def find(self, value: Any) -> int | None:
        """Return the id of a source value (name or number), or None outside the map."""
        text = _canonical(value)
        found = self._ids.get(text, self._truths.get(text.casefold()))
        return self._ids.get(_spell_index(text)) if found is None else found

    @staticmethod
    def build(data: Data, train: RawColumns, model_names: list[str] | None) -> LabelMap:
        """Decide names and order: the recipe's, else the source's own, else the values found in train.

        Where `model_names` (the id2label of a model that was fine-tuned before) are the same words, or
        the values are plain numbers 0…k−1, the model's ids and names are kept, so that its head stays valid.
        """
        if train.columns[2] == "answers":
            unanswered = not all(map(has_answer, train.labels or ()))
            return LabelMap(["answer", "no answer"] if unanswered else ["answer"], {})
        if train.columns[2] == "number":
            column = data.columns["label"]
            return LabelMap(["score" if column == "label" else column], {})
        if not train.named:
            return LabelMap([], {})
        _refuse_other_kinds(data, train)
        values, names = _name_values(data, train)
        if model_names and names == values == [str(index) for index in range(len(model_names))]:
            names = model_names
        order = _order_names(list(dict.fromkeys(names)), model_names)
        if len(order) < 2:
            found = f"has the single label {order[0]!r}" if order else "has no label in any row"
            raise DataError(f"data: split {train.split!r} {found}; classification needs at least two")
        numbers = {name: index for index, name in enumerate(order)}
        ids = numbers | {value: numbers[name] for value, name in zip(values, names, strict=True)}
        return LabelMap(order, ids)


def _refuse_other_kinds(data: Data, train: RawColumns) -> None:
    """Raise DataError for lists, and for many different fractions, where each text is to have one name."""
    if train.columns[2] != "label":
        return
    for row, value in enumerate(train.labels or (), 1):
        if isinstance(parse_json(value) if str(value).startswith("[") else value, (list, tuple)):
            raise DataError(
                f"data.columns.label: row {row} of split {train.split!r} has the list {str(value)[:60]}; write "
                "data.problem_type: multi_label_classification where a text has any number of labels"
            )
    found = _find_values(train)
    fractions = [value for value in found if _is_number(value) and not float(value).is_integer()]
    if data.labels is None and train.declared is None and fractions and len(found) > _MAX_FRACTIONS:
        raise DataError(
            f"data.columns.label: split {train.split!r} has {len(found)} different labels, numbers such as "
            f"{min(fractions)} among them; write data.problem_type: regression to learn numbers, or name the classes "
            "in data.labels"
        )


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
    are_truths = {value.casefold() for value in found} <= _TRUTHS
    if are_truths and len(names) == 2 and not _TRUTHS & {name.casefold() for name in names}:
        return ["false", "true"], names
    if all(map(_is_number, found)) and not any(map(_is_number, names)):
        return [str(index) for index in range(len(names))], names
    return names, names


def _find_values(train: RawColumns) -> set[str]:
    return {_canonical(value) for value in train.list_labels() if not _is_missing(value)}


def check_rows(raw: RawColumns, labels: LabelMap, data: Data) -> Examples:
    """Return the good rows of a split; raise DataError naming the bad ones beyond `max_bad_fraction`."""
    rows: list[tuple[list[str], int, Any]] = []
    problems: dict[int, str] = {}
    for index in range(len(raw.texts)):
        try:
            rows.append(_read_row(raw, index, labels))
        except ValueError as problem:
            problems[index] = str(problem)
    refuse_beyond(len(problems), len(raw.texts), data, _list_problems(raw.split, problems))
    good = [index for index in range(len(raw.texts)) if index not in problems]
    return Examples(
        [texts[0] for texts, _, _ in rows],
        [texts[1] for texts, _, _ in rows] if raw.pairs is not None else None,
        np.array([label for _, label, _ in rows], dtype=np.int64),
        np.array(good, dtype=np.int64) + 1,
        len(problems),
        [target for _, _, target in rows] if _TARGETS & set(raw.columns) else None,
        tuple(labels.names),
    )


def _read_row(raw: RawColumns, index: int, labels: LabelMap) -> tuple[list[str], int, Any]:
    """Return the texts, the label's id and the target of a row; raise ValueError saying what is wrong with it."""
    texts = []
    for column, values in zip(raw.columns[:2], (raw.texts, raw.pairs), strict=True):
        if values is not None:
            value = _JOIN[column](values[index]) if column in _JOIN else values[index]
            if problem := _find_text_problem(value):
                raise ValueError(f"{column} {problem}")
            texts.append(_as_text(value) or "")
    value = raw.labels[index] if raw.labels is not None else None
    if raw.columns[0] == "messages":
        return texts, 0, read_messages(raw.texts[index])
    if raw.columns[2] == "tags":
        return texts, 0, read_tags(raw.texts[index], value, labels.find)
    if raw.columns[2] == "answers":
        return texts, 0, read_answers(texts[1], value)
    if raw.columns[2] == "labels":
        return texts, 0, read_labels(value, labels.find)
    if raw.columns[2] == "number":
        return texts, 0, read_number(value)
    return texts, _find_label(value, labels) if raw.labels is not None else 0, None


_JOIN: dict[str | None, Callable[[Any], str]] = {
    "tokens": lambda value: join_words(value)[0],
    "messages": lambda value: join_messages(read_messages(value)),
}
"""How columns that are no texts are shown as one."""


def _find_label(value: Any, labels: LabelMap) -> int:
    if _is_missing(value):
        raise ValueError("label is missing")
    found = labels.find(value)
    if found is None:
        raise ValueError(f"label {str(value)[:40]!r} is not one of {', '.join(map(repr, labels.names[:10]))}")
    return found


def refuse_beyond(bad: int, total: int, data: Data, what: str, keys: str = "data.labels or data.columns") -> None:
    """Raise DataError unless `bad` of `total` rows are within data.max_bad_fraction; `keys` may be what is wrong."""
    if bad > data.max_bad_fraction * total:
        needed = math.ceil(10_000 * bad / total) / 10_000
        way_out = f", or set them aside with data.max_bad_fraction: {needed:g} (now {data.max_bad_fraction:g})"
        # beyond a tenth it is the recipe that is wrong, not the rows
        raise DataError(f"data: {what}; correct the rows" + (way_out if needed <= 0.1 else f", {keys}"))


def _list_problems(split: str, problems: dict[int, str]) -> str:
    shown = "; ".join(f"row {index + 1}: {problem}" for index, problem in list(problems.items())[:_SHOWN_PROBLEMS])
    more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    return f"split {split!r} has {len(problems)} bad row{'s' * (len(problems) > 1)} ({shown}{more})"


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
    """Numbers and dates are texts too: where all of a column look like it, they are read as such."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not _is_missing(value):
        return str(value)
    return spell_date(value) if isinstance(value, (str, date)) else None


def _canonical(value: Any) -> str:
    """One spelling for 1, 1.0 and "1", and for True and "true"; other strings are stripped."""
    return str(spell_label(spell_date(value))).strip()


def _spell_index(text: str) -> str:
    """Return a whole number as Python spells it, however a program does (1e+00, 1.000000); other text as it is."""
    return str(int(float(text))) if _is_number(text) and float(text).is_integer() else text


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
