"""Folders that another node may need again, kept in the store by the hash of what they were made of: a cache.

<store>/<room>/<key>/manifest.json    written last, names the key and every file; what it names is verified
<store>/<room>/<key>/…                the files

Whatever goes wrong here costs time and not the run: what cannot be fetched is made again, what cannot be kept is not,
and after the first trouble nothing more is asked. What was kept for more than `days` goes when something else is kept,
by the store's own clock.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from job.errors import JobError, NoValidCheckpoint, SecurityRefused
from job.store.manifest import Manifest, describe_files, list_files
from job.store.objects import Store, open_room
from job.store.transfer import download_files, sweep_unfinished, upload_files

if TYPE_CHECKING:
    from job.recipe import Run  # to build its classes takes time that most verbs have not

log = logging.getLogger("job.store")

_DAY_S = 86_400.0
_MANIFEST = "manifest.json"
_OURS = re.compile(r"([0-9a-f]{64})/.*[^/]")
"""Whatever else lies in a room is somebody's: a folder's marker, a note."""


class SharedFolders:
    """One room of a run's store, which is not opened before something is asked of it. Keys are sha256 (hex)."""

    def __init__(self, run: Run, room: str, days: int) -> None:
        self._address, self._room, self._days = run.recipe.store, room, days
        self._gave_up, self._damaged = False, set[str]()

    @cached_property
    def _store(self) -> Store:
        return open_room(self._address, self._room)

    def fetch(self, key: str, folder: Path) -> bool:
        """Download what was kept under `key` into `folder`, which is empty; tell whether all of it is there.

        Raises SecurityRefused (19) for a path that would leave the folder.
        """
        if self._gave_up:
            return False
        try:
            manifest = self._read_manifest(key)
            if manifest:
                download_files(self._store, manifest, folder)
            return manifest is not None
        except SecurityRefused:
            raise
        except NoValidCheckpoint as error:
            self._damaged.add(key)
            log.warning("%s; made again on this node", error)
        except (JobError, OSError) as error:
            self._give_up(error)
        shutil.rmtree(folder)
        folder.mkdir()
        return False

    def keep(self, key: str, folder: Path) -> None:
        """Upload `folder` under `key`, unless another node has done so, and delete what was kept for too long."""
        if self._gave_up:
            return
        try:
            if key in self._damaged or self._read_manifest(key) is None:
                entries = describe_files(folder, list_files(folder), key)
                upload_files(self._store, folder, entries)
                self._store.write(f"{key}/{_MANIFEST}", Manifest(self._room, entries, {"key": key}).to_bytes())
            self._forget_old(key)
        except (JobError, OSError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._gave_up = True
        log.warning("%s; this run makes and keeps for itself what it might share in %s/", error, self._room)

    def _read_manifest(self, key: str) -> Manifest | None:
        where = f"{key}/{_MANIFEST}"
        blob = self._store.read(where)
        if blob is None:
            return None
        manifest = Manifest.parse(blob.data, f"{self._store.uri}/{where}")
        if (manifest.kind, manifest.about.get("key")) != (self._room, key):
            raise NoValidCheckpoint(f"{self._store.uri}/{where}: belongs to another folder (copied?)")
        return manifest

    def _forget_old(self, just_kept: str) -> None:
        found: dict[str, list[str]] = defaultdict(list)
        written: dict[str, float] = {}
        for item in self._store.list(""):
            if (ours := _OURS.fullmatch(item.key)) and item.modified:
                found[ours[1]].append(item.key)
                written[ours[1]] = max(item.modified, written.get(ours[1], 0.0))
        now = written.get(just_kept, 0.0)  # not the latest of all: one of them may have a wrong clock
        old = {key for key, modified in written.items() if modified < now - self._days * _DAY_S}
        for key in old:
            self._store.delete([f"{key}/{_MANIFEST}"])  # first: half of it is none
            self._store.delete(found[key])
        if old:
            sweep_unfinished(self._store, lambda key: key.partition("/")[0] in old)
