"""Texts to answer, from lines, JSON lines or CSV; read as they come, nothing is kept."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from job.errors import DataError, NotFound
from job.predict.tokens import Text

FORMATS = ("lines", "jsonl", "csv", "tsv")
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}
_COLUMNS = ("text", "text_pair")
_MAX_FIELD = 16 << 20


@contextmanager
def open_texts(source: Path | None, format_: str = "auto", pairs: bool = False) -> Iterator[Iterator[Text]]:
    """Yield the texts of a file (None: stdin); `format_` auto: by the file's name, else lines.

    lines: a text each, or with `pairs` two with a tab between them · jsonl: a string, [text, pair], or an object with
    `text` and perhaps `text_pair` · csv, tsv: those columns. Raises DataError (11) naming the row that is none.
    """
    if format_ == "auto":
        format_ = _SUFFIXES.get(source.suffix.lower() if source else "", "lines")
    if format_ not in FORMATS:
        raise DataError(f"--format {format_!r}: must be auto, {', '.join(FORMATS)}")
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
def _open(source: Path | None) -> Iterator[TextIO]:
    if source is None:
        yield sys.stdin
        return
    try:
        with source.open(encoding="utf-8", newline="") as file:
            yield file
    except FileNotFoundError:
        raise NotFound(f"{source}: no such file; name a file of texts, or leave --file out for stdin") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None


def _parse_json(line: str, row: int) -> Text:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        value = [value.get(name) for name in _COLUMNS if value.get(name) is not None]
        value = value[0] if len(value) == 1 else value
    if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
        return value[0], value[1]
    if not isinstance(value, str):
        raise DataError(
            f"row {row}: {line.strip()[:60]!r} is no text; give a string, [text, pair] or an object with `text`"
        )
    return value


def _read_table(file: Iterable[str], delimiter: str) -> Iterator[Text]:
    csv.field_size_limit(_MAX_FIELD)
    reader = csv.DictReader(file, delimiter=delimiter)
    if "text" not in (reader.fieldnames or []):
        raise DataError(f"the first row names the columns {reader.fieldnames}; one must be called `text`")
    try:
        for row, entry in enumerate(reader, 1):
            if entry["text"] is None:
                raise DataError(f"row {row}: has no text; correct the row")
            yield (entry["text"], entry["text_pair"]) if entry.get("text_pair") is not None else entry["text"]
    except csv.Error as error:
        raise DataError(f"row {reader.line_num}: {error}; correct the file") from None
