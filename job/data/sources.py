"""Finding and reading rows: local files and folders, s3:// objects, Hub data sets at a commit.

Formats are CSV, TSV, JSON lines, JSON, parquet and text. Data set scripts are never run.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import DataError, JobError, NotFound, ResourceExhausted
from job.recipe.schema import Data
from job.store.hub import download_snapshot, is_repository, resolve_commit
from job.store.objects import open_store, split_uri
from job.store.transfer import mirror_objects

log = logging.getLogger("job.data")

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
    if path.exists():
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
        return _load(source, _format_of(file), {"train": [str(file)]}, split)["train"]
    if source.path.is_file():
        splits = _load(source, _format_of(source.path), {"train": [str(source.path)]}, split)
    else:
        splits = _load_folder(source, data.config, split)
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
        if candidate.is_file():
            return candidate.absolute()
    raise NotFound(f"data: split file {split!r} is neither in {folder} nor at that path; correct it")


def _format_of(file: Path) -> str:
    if file.suffix not in FORMATS:
        raise DataError(f"data.source: {file.name!r} has no known format; use {', '.join(FORMATS)}")
    if file.stat().st_size == 0:
        raise DataError(f"data.source: {file} is empty; give it rows")
    return FORMATS[file.suffix]


def _load_folder(source: DataSource, config: str | None, split: str) -> Any:
    """Read a folder: files or sub-folders named after the split, else whatever its README or `datasets` finds."""
    files = sorted(path for path in source.path.rglob("*") if path.suffix in FORMATS and path.is_file())
    if not files:
        raise DataError(f"data.source: no {', '.join(FORMATS)} file in {source.origin!r}; correct the path")
    by_label = sorted((source.path / split).glob("*/*.txt"))
    if by_label:
        return {split: _read_label_folders(by_label)}
    shards = [path for path in files if _belongs_to(path.relative_to(source.path), split)]
    if shards and config is None and not _declares_files(source.path):
        return _load(source, _format_of(shards[0]), {split: [str(path) for path in shards]}, split)
    return _load(source, str(source.path), None, split, config)


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

    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return Dataset.from_dict({"text": texts, "label": [path.parent.name for path in files]})


def _load(
    source: DataSource, what: str, files: dict[str, list[str]] | None, split: str, config: str | None = None
) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    options: dict[str, Any] = {"name": config} if config else {}
    if files:
        options["data_files"] = files
    if what == "csv":
        # without keep_default_na=False the text "null" or "NA" would be read as missing
        separator = "\t" if files and next(iter(files.values()))[0].endswith(".tsv") else ","
        options |= {"keep_default_na": False, "sep": separator}
    try:
        return datasets.load_dataset(what, cache_dir=str(source.cache / "datasets"), **options)
    except OSError as error:
        if getattr(error, "errno", None) == 28:
            raise ResourceExhausted(f"{source.cache}: disk is full; free space or move --work-dir") from None
        raise _unreadable(source, split, error) from None
    except Exception as error:  # the formats' readers raise errors of many libraries
        raise _unreadable(source, split, error) from None


def _unreadable(source: DataSource, split: str, error: Exception) -> JobError:
    cause = error.__cause__ or error
    reason = re.sub(r"\s+", " ", str(cause)).strip()[:300]
    return DataError(f"data.source: cannot read split {split!r} of {source.origin!r}: {reason}; correct the file")


def _download_objects(uri: str, cache: Path, allow_http: bool) -> Path:
    """Copy one object, or all data files below a prefix, into the cache; return file or folder."""
    parent, name = split_uri(uri) if Path(uri).suffix in FORMATS else (uri.rstrip("/"), "")

    def wanted(key: str) -> bool:
        return key == name if name else Path(key).suffix in FORMATS or key == "README.md"

    folder = mirror_objects(open_store(parent, allow_http=allow_http), name, wanted, cache / "objects")
    if folder is None:
        raise NotFound(f"data.source: no {', '.join(FORMATS)} object at {uri}; check the address")
    return folder / name
