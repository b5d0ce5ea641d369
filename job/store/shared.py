"""Folders that another node may need again, kept in the store by the hash of what they were made of: a cache.

<store>/<room>/<key>/manifest.json    written last; what it names is verified
<store>/<room>/<key>/…                the files

What goes wrong here costs time and not the run: what cannot be fetched is made again, what cannot be kept is not. What
was kept for more than `days` goes when something else is kept, by the store's own clock.
"""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from job.errors import AccessDenied, NotFound, NoValidCheckpoint, Unreachable
from job.recipe import Run
from job.store.manifest import Manifest, describe_files, list_files
from job.store.objects import Store, open_store
from job.store.transfer import download_files, upload_files

log = logging.getLogger("job.store")

_DAY_S = 86_400.0
_MANIFEST = "manifest.json"
_FORGIVEN = (AccessDenied, NotFound, NoValidCheckpoint, Unreachable)


class SharedFolders:
    """One room of a run's store, which is not opened before something is asked of it."""

    def __init__(self, run: Run, room: str, days: int) -> None:
        self._where, self._room, self._days = run.recipe.store, room, days

    @cached_property
    def _store(self) -> Store:
        where = self._where
        return open_store(f"{where.uri}/{self._room}", allow_http=where.allow_http, single_writer=where.single_writer)

    def fetch(self, key: str, folder: Path) -> bool:
        """Download what was kept under `key` into `folder`, which is empty; tell whether all of it is there."""
        try:
            blob = self._store.read(f"{key}/{_MANIFEST}")
            if blob is None:
                return False
            download_files(self._store, Manifest.parse(blob.data, f"{self._store.uri}/{key}/{_MANIFEST}"), folder)
            return True
        except _FORGIVEN as error:
            log.warning("%s; made again on this node", error)
            shutil.rmtree(folder)
            folder.mkdir()
            return False

    def keep(self, key: str, folder: Path) -> None:
        """Upload `folder` under `key`, over what is there, and delete what has been kept for too long."""
        try:
            entries = describe_files(folder, list_files(folder), key)
            upload_files(self._store, folder, entries)
            self._store.write(f"{key}/{_MANIFEST}", Manifest(self._room, entries).to_bytes())
            self._forget_old()
        except _FORGIVEN as error:
            log.warning("%s; other nodes make it again", error)

    def _forget_old(self) -> None:
        found: dict[str, list[str]] = defaultdict(list)
        written: dict[str, float] = {}
        for item in self._store.list(""):
            key = item.key.partition("/")[0]
            found[key].append(item.key)
            written[key] = max(item.modified, written.get(key, 0.0))
        oldest = max(written.values()) - self._days * _DAY_S
        for key in (key for key, modified in written.items() if modified < oldest):
            self._store.delete([f"{key}/{_MANIFEST}"])  # first: half of it is none
            self._store.delete(found[key])
