"""Texts to answer, from lines, JSON lines or CSV; read as they come, nothing is kept."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from job.errors import DataError, NotFound
from job.predict.tokens import Input, Text

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}
_COLUMNS = (("text", "question", "source"), ("text_pair", "context"))
_MAX_FIELD = 16 << 20


@contextmanager
def open_texts(source: Path | None, format_: str = "auto", pairs: bool = False) -> Iterator[Iterator[Input]]:
    """Yield the texts of a file (None: stdin); `format_` auto: by the file's name, else lines.

    lines: a text each, or with `pairs` two with a tab between them · jsonl: a string, [text, pair], or an object with
    `text` and perhaps `text_pair`, `question` and `context`, or `messages` · csv, tsv: those columns, no `messages`.
    A byte order mark is left out.
    Raises DataError (11) naming the row that is none, NotFound (13) for a file that is not there.
    """
    if format_ == "auto":
        format_ = _SUFFIXES.get(source.suffix.lower() if source else "", "lines")
    with _open(source) as file:
        if format_ in ("csv", "tsv"):
            yield _read_table(file, "\t" if format_ == "tsv" else ",")
        elif format_ == "jsonl":
            yield (_parse_json(line, row) for row, line in enumerate(file, 1) if line.strip())
        else:
            lines = (line.rstrip("\r\n") for line in file)
            yield map(split_pair, lines) if pairs else lines


def split_pair(line: str) -> Text:
    """Return the two texts of a line with a tab between them, or the line."""
    first, tab, second = line.partition("\t")
    return (first, second) if tab else line


@contextmanager
def _open(source: Path | None) -> Iterator[Iterator[str]]:
    name = source or "stdin"
    try:
        with source.open(encoding="utf-8-sig", newline="") if source else nullcontext(sys.stdin) as file:
            yield _without_mark(file)
    except (FileNotFoundError, IsADirectoryError):
        raise NotFound(f"{name}: no such file; name a file of texts, or leave --file out for stdin") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: is not UTF-8 ({error.reason} at byte {error.start}); write it as UTF-8 text, a line each, or as "
            ".jsonl, .csv or .tsv"
        ) from None


def _without_mark(lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield line if number else line.removeprefix("\ufeff")


def _parse_json(line: str, row: int) -> Input:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return list(value["messages"])
    if isinstance(value, dict):
        text, pair = (next((value[name] for name in names if name in value), None) for names in _COLUMNS)
        value = text if pair is None else [text, pair]
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return value[0], value[1]
    if not isinstance(value, str):
        raise DataError(
            f"row {row}: {line.strip()[:60]!r} is no text; give a string, [text, pair] or an object with `text`"
        )
    return value


def _read_table(file: Iterable[str], delimiter: str) -> Iterator[Text]:
    csv.field_size_limit(_MAX_FIELD)
    # in a table of tabs a text may begin with a quotation mark; only a cell that is wholly quoted is read as such
    plain = delimiter == "\t"
    reader = csv.DictReader(
        file, delimiter=delimiter, quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL, strict=True
    )
    names, row = [], 0
    try:
        names = list(reader.fieldnames or [])
        if plain:
            reader.fieldnames = names = list(map(_unquote, names))
        chosen = [name for ours in _COLUMNS for name in ours if name in names]
        if not set(chosen) & set(_COLUMNS[0]):
            raise DataError(f"the first row names the columns {names}; one must be called `text`")
        for row, entry in enumerate(reader, 1):
            texts = [entry[name] for name in chosen]
            if None in entry or None in texts:
                differs = "more" if None in entry else "fewer"
                raise DataError(f"row {row}: has {differs} columns than the first; correct the row")
            texts = list(map(_unquote, texts)) if plain else texts
            yield (texts[0], texts[1]) if len(texts) > 1 else texts[0]
    except csv.Error as error:
        where = f"row {row + 1}" if names else "the first row"
        raise DataError(f"{where}: {error}; correct its quotation marks") from None


def _unquote(cell: str) -> str:
    """Return what a program has put into quotation marks, as `job.data` reads it for the training; else the cell."""
    whole = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    return whole[1].replace('""', '"') if whole else cell
