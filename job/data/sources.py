"""Finding and reading rows: local files and folders, s3:// objects, Hub data sets at a commit.

Formats are CSV, TSV, JSON lines, JSON, parquet and text. Data set scripts are never run.
"""

from __future__ import annotations

import csv
import glob
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from job.errors import DataError, JobError, NotFound, ResourceExhausted, blames_node, lacks_disk
from job.recipe.schema import Data
from job.store.hub import download_snapshot, is_repository, resolve_commit
from job.store.objects import open_store, split_uri
from job.store.transfer import mirror_objects

log = logging.getLogger("job.data")

_LEFT_S = 86400.0
"""Seconds; nobody reads one split for so long."""

FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class DataSource:
    """Where the rows lie on this node, and the Hub commit they come from, if any."""

    origin: str
    path: Path
    commit: str | None
    cache: Path


def locate_data(data: Data, cache: Path, *, allow_http: bool = False) -> DataSource:
    """Bring the data to this node; a Hub revision is resolved to its commit first."""
    origin, path = data.source, Path(data.source)
    if origin.startswith("s3://"):
        return DataSource(origin, _download_objects(origin, cache, allow_http), None, cache)
    if os.path.exists(path):  # unlike Path.exists, it takes a name that is too long for one that is not there
        return DataSource(origin, path.absolute(), None, cache)
    if path.suffix in FORMATS or not is_repository(origin):
        raise NotFound(
            f"data.source: {origin!r} does not exist; correct the path (`make assets` fetches the quickstart's)"
        )
    commit = resolve_commit(origin, "dataset", data.revision)
    return DataSource(origin, download_snapshot(origin, "dataset", commit, cache / "hub"), commit, cache)


def read_split(source: DataSource, data: Data, split: str) -> Any:
    """Return the rows of one split as a `datasets.Dataset`; `split` is a name or a file."""
    file = _as_file(source, split)
    if file:
        return _load_files(source, data, [file], split)
    if source.path.is_file():
        splits = {"train": _load_files(source, data, [source.path], split)}
    else:
        splits = _load_folder(source, data, split)
    if split not in splits:
        known = ", ".join(map(repr, splits))
        raise DataError(
            f"data: split {split!r} is not in {source.origin!r} (it has {known}); name one of these, a file, "
            "or (for validation and test) a fraction of train such as 0.2"
        )
    return splits[split]


def list_split_files(source: DataSource, data: Data) -> list[Path]:
    """Return the files that the recipe names as splits, wherever they lie."""
    named = (split for split in (data.train, data.validation, data.test) if isinstance(split, str))
    return [file for split in named if (file := _as_file(source, split))]


def _as_file(source: DataSource, split: str) -> Path | None:
    """Return the file that a split value names: beside or inside the source, or by its own path."""
    if Path(split).suffix not in FORMATS:
        return None
    folder = source.path if source.path.is_dir() else source.path.parent
    for candidate in (folder / split, Path(split)):
        if os.path.isfile(candidate):
            return candidate.absolute()
    raise NotFound(f"data: split file {split!r} is neither in {folder} nor at that path; correct it")


def _format_of(file: Path) -> str:
    if file.suffix not in FORMATS:
        raise DataError(f"data.source: {file.name!r} has no known format; use {', '.join(FORMATS)}")
    if file.stat().st_size == 0:
        raise DataError(f"data.source: {file} is empty; give it rows")
    return FORMATS[file.suffix]


def _load_folder(source: DataSource, data: Data, split: str) -> Any:
    """Read a folder: files or sub-folders named after the split, else whatever its README or `datasets` finds.

    What is hidden (`.ipynb_checkpoints`) is not looked at.
    """
    files = [path for path in _list_visible(source.path) if path.suffix in FORMATS]
    if not files:
        raise DataError(f"data.source: no {', '.join(FORMATS)} file in {source.origin!r}; correct the path")
    texts = [path for path in files if path.suffix == ".txt" and path.parent.parent == source.path / split]
    if texts:
        return {split: _read_label_folders(texts)}
    shards = [path for path in files if _belongs_to(path.relative_to(source.path), split)]
    if shards and data.config is None and not _declares_files(source.path):
        _warn_of_several_folders(shards, source.path, split)
        return {split: _load_files(source, data, shards, split)}
    if glob.has_magic(str(source.path)):
        raise DataError(
            f"data.source: the folder's name {str(source.path)!r} has one of * ? [, by which `datasets` finds none of "
            "its files; rename it, or name the files in data.train, data.validation and data.test"
        )
    options: dict[str, Any] = {"name": data.config} if data.config else {}
    # columns of a type that the README declares stay what they are
    if all(FORMATS[path.suffix] == "csv" for path in files) and "dataset_info" not in read_front_matter(source.path):
        options |= _keep_cells(data, files)
    return _load(source, str(source.path), files, split, options)


def _list_visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and _is_visible(path.relative_to(folder)))


def _is_visible(path: Path) -> bool:
    """Tell whether no part of a relative path is hidden."""
    return not any(part.startswith(".") for part in path.parts)


def _warn_of_several_folders(shards: list[Path], root: Path, split: str) -> None:
    folders = sorted({path.parent.relative_to(root) for path in shards})
    if len({len(folder.parts) for folder in folders}) > 1:
        log.warning(
            "split %r is read from several folders, one in another: %s", split, ", ".join(map(str, folders[:5]))
        )


def _declares_files(folder: Path) -> bool:
    """Tell whether the folder's README names the files of each split, as Hub data sets do."""
    return "data_files" in read_front_matter(folder)


def read_front_matter(folder: Path) -> str:
    """Return the part of a data folder's README that is meant for programs, "" where there is none."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace")[:100_000] if readme.is_file() else ""
    return text[3:].partition("\n---")[0] if text.startswith("---") else ""


def _belongs_to(path: Path, split: str) -> bool:
    """Tell whether a data file is one of a split's: train.csv, train-00000-of-00002.csv, train/anything.csv."""
    return bool(re.fullmatch(rf"{re.escape(split)}([-_.].*)?", path.stem)) or path.parts[0] == split


def _read_label_folders(files: list[Path]) -> Any:
    """Return texts labelled by their folder: train/pos/1.txt, train/neg/2.txt, …"""
    from datasets import Dataset

    return Dataset.from_dict({"text": list(map(_read_text, files)), "label": [path.parent.name for path in files]})


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.source: {path} is not UTF-8 ({error.reason} at byte {error.start}); convert it"
        ) from None


def _load_files(source: DataSource, data: Data, files: list[Path], split: str) -> Any:
    """Return the rows of files of one format as they are now, whatever their names spell."""
    kind = _format_of(files[0])
    options: dict[str, Any] = {"data_files": [glob.escape(str(file)) for file in files], "split": "train"}
    if kind == "csv":
        options |= _choose_csv_options(data, files)
    rows = _load(source, kind, files, split, options)
    # what pandas calls the first cell of rows that all have one more than the header
    if kind == "csv" and (extra := "__index_level_0__") in rows.column_names and extra not in _read_header(files[0]):
        raise DataError(
            f"data.source: the rows of split {split!r} of {source.origin!r} have one cell more than its header, "
            "so texts would be cut; quote those that hold the separator, or name the first column"
        )
    return _drop_blank_lines(rows) if kind == "text" else rows


def _drop_blank_lines(rows: Any) -> Any:
    """Return the lines of a text that hold something: blank ones stand between paragraphs."""
    import pyarrow.compute

    filled = pyarrow.compute.not_equal(pyarrow.compute.utf8_trim_whitespace(rows.data.column("text")), "").to_numpy()
    return rows if filled.all() else rows.select(filled.nonzero()[0])


def _choose_csv_options(data: Data, files: list[Path]) -> dict[str, Any]:
    """Return how files are read whose separator goes by their name.

    The texts of a TSV often stand as they are, and a quotation mark that begins one would swallow the next rows.
    """
    options = _keep_cells(data, files)
    if files[0].suffix != ".tsv":
        return options | {"sep": ","}
    quoted = any('"' in name for name in _read_header(files[0], csv.QUOTE_NONE))
    loose = [] if quoted else [file for file in files if not _is_well_quoted(file)]
    if not loose:
        return options | {"sep": "\t"}
    log.warning("%s: its quotation marks do not pair, so those that begin or end a part of a cell are text", loose[0])
    read = {name: partial(_unquote, read) for name, read in options["converters"].items()}
    return options | {"sep": "\t", "quoting": csv.QUOTE_NONE, "converters": read}


def _keep_cells(data: Data, files: list[Path]) -> dict[str, Any]:
    """Return how every cell of a CSV is read as it is spelled. pandas would read 007 as 7, and NA as missing.

    It decides over thousands of rows at a time, so a number in the first and a word in the last would not fit together.
    """
    for file in files:
        _refuse_other_separator(data, file)
    columns = {*data.columns.values(), *(name for file in files for name in _read_header(file))}
    converters: dict[str, Callable[[str], str]] = dict.fromkeys(sorted(columns), str)
    if "label" in data.columns:
        converters[data.columns["label"]] = _read_label
    return {"keep_default_na": False, "converters": converters}


def _refuse_other_separator(data: Data, file: Path) -> None:
    """Raise DataError for a table whose cells stand between other marks than its name says, as spreadsheets write."""
    wanted = set(data.columns.values())
    if wanted <= set(_read_header(file)):
        return
    other = next((mark for mark in ";\t,|" if wanted <= set(_read_header(file, separator=mark))), None)
    if other:
        raise DataError(
            f"data.source: {file}:1: its cells stand between {other!r}, but {file.suffix} has {_separator_of(file)!r} "
            "there; write it anew, with ',' as .csv or with tabs as .tsv"
        )


def _separator_of(file: Path) -> str:
    return "\t" if file.suffix == ".tsv" else ","


def _read_header(file: Path, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL, separator: str = "") -> list[str]:
    """Return the names in a file's first row; none where it is broken, which the library that reads it will say."""
    separator = separator or _separator_of(file)
    try:
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            return next(csv.reader(lines, delimiter=separator, quoting=quoting), [])
    except csv.Error:
        return []


def _read_label(cell: str) -> str:
    """Return a label as it is spelled, but 1.0 as 1: so pandas writes whole numbers where one is missing."""
    whole = re.fullmatch(r"(-?\d+)\.0+", cell)
    return whole[1] if whole else cell


def _unquote(read: Callable[[str], str], cell: str) -> str:
    """Return what `read` makes of a cell; a program has put one that is wholly in quotation marks into them."""
    whole = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    return read(whole[1].replace('""', '"') if whole else cell)


def _is_well_quoted(file: Path) -> bool:
    """Tell whether the quotation marks at the beginning of cells all end one too, as a program writes them."""
    csv.field_size_limit(1 << 30)
    try:
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            for _ in csv.reader(lines, delimiter="\t", strict=True):
                pass
            return True
    except csv.Error:
        return False


def _load(source: DataSource, what: str, files: Iterable[Path], split: str, options: dict[str, Any]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what cannot be read is said once, by the error below
    try:
        with _lend_folder(source.cache / "datasets") as folder:
            return datasets.load_dataset(what, cache_dir=folder, **options)
    except Exception as error:  # the formats' readers raise errors of many libraries
        _refuse_lack(source, error.__cause__ or error)
        raise _unreadable(source, split, files, error) from None


@contextmanager
def _lend_folder(place: Path) -> Iterator[str]:
    """Yield a folder for rows that are read once: what they are mapped from stays readable when its name is gone.

    Another process' rows may be half written, or damaged by a power cut, and nothing in them would tell. What is to be
    read again is kept by `prepared.py`, which verifies it.
    """
    place.mkdir(parents=True, exist_ok=True)
    for left in place.iterdir():  # by processes that were killed, or by earlier versions
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT_S:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="rows-", dir=place, ignore_cleanup_errors=True) as folder:
        yield folder


def _refuse_lack(source: DataSource, cause: BaseException) -> None:
    """Raise what says something of this node, and nothing of a data file."""
    if lacks_disk(cause):
        raise ResourceExhausted(f"{source.cache}: disk is full; free space or move --work-dir") from None
    if blames_node(cause):
        raise cause from None
    if isinstance(cause, OSError) and str(cause.filename).startswith(str(source.cache)):
        raise ResourceExhausted(
            f"{cause.strerror} ({cause.filename}); give --work-dir a folder that this user may write"
        ) from None


def _unreadable(source: DataSource, split: str, files: Iterable[Path], error: Exception) -> JobError:
    cause = error.__cause__ or error
    reason = re.sub(r"\s+", " ", str(cause)).strip()[:300]
    if "corresponds to no data" in reason:
        return DataError(f"data: split {split!r} of {source.origin!r} has no rows; give it some")
    for file in (each for each in files if FORMATS[each.suffix] != "parquet"):
        if line := _find_foreign_line(file):
            return DataError(
                f"data.source: {file}:{line}: is not UTF-8, as which all is read; convert it (say, "
                f"iconv -f WINDOWS-1252 -t UTF-8 {file.name} > utf8{file.suffix})"
            )
    return DataError(f"data.source: cannot read split {split!r} of {source.origin!r}: {reason}; correct the file")


def _find_foreign_line(file: Path) -> int | None:
    """Return the number of the first line that is not UTF-8. What a library says of it counts within a block."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return None


def _download_objects(uri: str, cache: Path, allow_http: bool) -> Path:
    """Copy one object, or all data files below a prefix, into the cache; return file or folder."""
    is_file = Path(uri).suffix in FORMATS and not uri.endswith("/")
    parent, name = split_uri(uri) if is_file else (uri.rstrip("/"), "")

    def wanted(key: str) -> bool:
        if name:
            return key == name
        return (Path(key).suffix in FORMATS and _is_visible(Path(key))) or key == "README.md"

    try:
        folder = mirror_objects(open_store(parent, allow_http=allow_http), name, wanted, cache / "objects")
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(
            f"data.source: below {uri} an object and a folder have one name ({Path(str(error.filename)).name!r}), "
            "which no file system takes; rename one, or name a file"
        ) from None
    if folder is None:
        raise NotFound(f"data.source: no {', '.join(FORMATS)} object at {uri}; check the address")
    return folder / name
