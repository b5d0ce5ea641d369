"""One run on one node: its recipe, its id, and where its files lie.

Stages are processes of their own; they find each other's files through this map and nothing else.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.recipe.schema import Recipe


@dataclass(frozen=True)
class Run:
    """A run's id, its recipe, and the work folder shared by all runs of this node."""

    run_id: str
    recipe: Recipe
    work: Path
    folder_name: str = ""

    @property
    def folder(self) -> Path:
        """Folder of this run, or of this process where another one works in that."""
        return self.work / "runs" / (self.folder_name or self.run_id)

    @property
    def cache(self) -> Path:
        """Folder of downloads and tokens, shared by all runs."""
        return self.work / "cache"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer as it is released."""
        return self.folder / "tokenizer"

    @property
    def base_model(self) -> Path:
        """The model to start from."""
        return Path(self.read("sources.json")["model"]["path"])

    @property
    def trained(self) -> Path:
        """What the training left: config.json, and model.safetensors with the weights that it has moved."""
        return self.folder / "final"

    @property
    def final_model(self) -> Path:
        """The trained model: config.json, and model.safetensors with all weights."""
        return self.folder / "merged" if self.recipe.merges else self.trained

    @property
    def bundle(self) -> Path:
        """The folder that is released as it is."""
        return self.folder / "bundle"

    @property
    def progress(self) -> Path:
        """How far the training is: written by rank 0, read by the supervisor."""
        return self.folder / "train" / "progress.json"

    def tokens(self, split: str) -> Path:
        """Folder of the tokenized `train`, `validation` or `test` rows."""
        return Path(self.read("data.json")["tokens"][split])

    def read(self, name: str) -> dict[str, Any]:
        """Return a small JSON file of the run's folder."""
        return dict(json.loads((self.folder / name).read_text()))

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write a small JSON file of the run's folder, atomically."""
        write_json(self.folder / name, value)

    def save(self) -> None:
        """Write what `Run.load` reads."""
        self.write("recipe.json", {"run_id": self.run_id, "recipe": self.recipe.model_dump(mode="json")})

    @staticmethod
    def load(folder: Path) -> Run:
        """Return the run whose folder this is, as another process saved it."""
        saved = json.loads((folder / "recipe.json").read_text())
        return Run(saved["run_id"], Recipe.model_validate(saved["recipe"]), folder.parent.parent, folder.name)

    def lock_folder(self, node_rank: int = 0) -> Run:
        """Return this run with a folder that belongs to this process as long as it lives; others' are cleared away.

        A second job, or the successor of one that was only stopped, must not write into what the first still reads;
        nor must the nodes of a run where they share a disk, so only node 0 has the folder that is named after the run.
        """
        if node_rank:
            return replace(self, folder_name=f"{self.run_id}~node-{node_rank}")._lock_folder()
        for left in self.folder.parent.glob(f"{self.run_id}~*"):  # no run id has a tilde
            if _lock(left, without_locks=False):
                shutil.rmtree(left, ignore_errors=True)
        return self._lock_folder()

    def _lock_folder(self) -> Run:
        if _lock(self.folder, without_locks=True):
            return self
        name = uuid.uuid4().hex[:8]
        private, unseen = replace(self, folder_name=f"{self.run_id}~{name}"), self.folder.with_name(f".{name}")
        _lock(unseen, without_locks=True)
        unseen.rename(private.folder)  # locked before anybody can find it and take it for a dead one's
        return private


def _lock(folder: Path, *, without_locks: bool) -> bool:
    """Lock a folder until this process ends; False where another process has it, `without_locks` where nobody can tell.

    On such a disk (NFS and Lustre may be mounted so) a run takes its own folder, and leaves all others alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # stays open: with it goes the lock
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except BlockingIOError:
        locked = False
    except OSError:
        locked = without_locks
    if not locked:
        os.close(handle)
    return locked


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON beside `path` and rename it into place, so that no reader sees a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
