"""What an earlier fetch has prepared, found again by content: its records, its tokenizer, and where its tables lie.

The key is a hash of all that a fetch reads: every file of the data, every file of the model but its weights, the
recipe's keys, this package's own code, and the versions of the libraries that read and tokenize. So nothing here
imports torch, transformers or datasets, and a run on known data begins seconds sooner. Whatever differs, or cannot be
told, is prepared anew.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from job.data.sources import DataSource, list_split_files, read_front_matter
from job.data.tokenize import is_whole_table
from job.errors import JobError
from job.recipe import Run, hash_json, write_json
from job.store.manifest import hash_file, list_files
from job.store.models import ModelSource
from job.store.transfer import build_folder

log = logging.getLogger("job.data")

RECORDS = ("data.json", "sample.json", "test.json")
_PACKAGE = Path(__file__).parent.parent
_LIBRARIES = ("transformers", "tokenizers", "datasets", "pandas", "pyarrow", "numpy")
_WEIGHTS = (".safetensors", ".onnx", ".onnx_data", ".bin", ".pt", ".pth", ".h5", ".msgpack")
"""Files of a model that tokenizing does not read; `_hash_model` judges those that are trained from."""
_ELSEWHERE = re.compile(r"://|\.\.|[\s\"'][/~]")
"""What may lead out of a folder, where its README says which files are whose."""


def name_inputs(run: Run, model: ModelSource, source: DataSource) -> str | None:
    """Return the sha256 (hex) of all that a fetch reads; None where it may read what is not known before."""
    try:
        return hash_json(_describe_inputs(run, model, source))
    except (OSError, ValueError, JobError):  # whether a file that cannot be read is needed at all shows when it is
        return None


def _describe_inputs(run: Run, model: ModelSource, source: DataSource) -> dict[str, Any]:
    recipe = run.recipe
    configs = read_front_matter(source.path).partition("configs")[2]
    if _ELSEWHERE.search(configs) or (source.path / ".huggingface.yaml").exists():
        raise ValueError("files may be named that lie elsewhere")
    rows, parts = _list_all(source.path), _list_all(model.path)
    texts = [path for path in parts if path.suffix not in _WEIGHTS]
    read = [*rows, *list_split_files(source, recipe.data), *texts, *_PACKAGE.rglob("*.py")]
    return {
        "recipe": [recipe.kind, recipe.data.model_dump(mode="json"), recipe.tuning.shots, recipe.training.seed],
        "class_weights": recipe.training.class_weights,
        "folders": [str(run.cache), str(source.path), str(model.path)],
        "files": {str(path): hash_file(path) for path in read},
        "versions": [platform.python_version(), *map(metadata.version, _LIBRARIES)],
    }


def take_prepared(run: Run, key: str | None) -> dict[str, Any] | None:
    """Put what was kept under `key` into the run's folder, as a fetch would; return its fingerprints, None if absent.

    What it had to warn of is said again.
    """
    folder = _find_folder(run, key)
    try:
        kept = json.loads((folder / "kept.json").read_text(encoding="utf-8"))
        whole = all(hash_file(folder / name) == digest for name, digest in kept["files"].items())
        records = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in RECORDS}
        if not whole or not all(is_whole_table(Path(table)) for table in records["data.json"]["tokens"].values()):
            return None
        shutil.copytree(folder / "tokenizer", run.tokenizer, dirs_exist_ok=True)
    except (OSError, ValueError, KeyError):
        return None
    for name in RECORDS:
        run.write(name, records[name])
    for message in kept["warnings"]:
        log.warning("%s", message)
    return dict(kept["fingerprints"])


def keep_prepared(run: Run, key: str | None, fingerprints: dict[str, Any], warnings: list[str]) -> None:
    """Keep what a fetch has just left in the run's folder, whole or not at all; what lay there was found damaged."""
    if key is None:
        return
    folder = _find_folder(run, key)
    with build_folder(folder) as partial:
        shutil.copytree(run.tokenizer, partial / "tokenizer")
        for name in RECORDS:
            shutil.copyfile(run.folder / name, partial / name)
        files = {name: hash_file(partial / name) for name in list_files(partial)}
        write_json(partial / "kept.json", {"files": files, "fingerprints": fingerprints, "warnings": warnings})
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def note_warnings() -> Iterator[list[str]]:
    """Yield the list of what is warned of meanwhile."""
    notes = _Notes(logging.WARNING)
    log.addHandler(notes)
    try:
        yield notes.messages
    finally:
        log.removeHandler(notes)


class _Notes(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _find_folder(run: Run, key: str | None) -> Path:
    return run.cache / "prepared" / (key or "none")


def _list_all(path: Path) -> list[Path]:
    """Return a file, or all files below a folder, sorted; raise ValueError where a link leads to another folder."""
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*"))
    if any(each.is_symlink() and each.is_dir() for each in found):
        raise ValueError("files may lie elsewhere")
    return [each for each in found if each.is_file()]
