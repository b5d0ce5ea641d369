"""Deleting checkpoints that nothing needs any more: call 13 of the commit protocol (`commit.py`).

What the pointer names stays: the current checkpoint and the last ones that were committed before it.
Only the owner of the run deletes; a manifest goes before the objects that it names, and an object
only when no manifest that stays names it. Nothing outside `checkpoints/` is ever touched.
The best model so far needs no checkpoint of its own to stay: its weights are a file of every later one.
"""

from __future__ import annotations

import logging

from job.errors import Fenced, JobError
from job.failpoints import failpoint
from job.store.lease import verify_owner
from job.store.manifest import Manifest
from job.store.objects import Store
from job.store.restore import parse_name

log = logging.getLogger("job.store")


class Retention:
    """Retires what this run wrote, for the attempt `epoch` whose lease has `nonce`."""

    def __init__(self, objects: Store, epoch: int, nonce: str) -> None:
        self._objects, self._epoch, self._nonce = objects, epoch, nonce
        self._left: dict[str, set[str]] = {}  # in each folder that nobody writes any more: it is listed once
        self._warned = False

    def retire(self, kept: dict[str, Manifest]) -> None:
        """Delete every checkpoint but `kept` (by manifest key, newest first), and what was begun before the newest.

        What cannot be deleted costs space, not the run: it is told once. Raises Fenced (76) when another owns the run.
        """
        try:
            doomed = self._find_doomed(kept)
            self._delete(doomed)
            self._left = {folder: keys.difference(doomed) for folder, keys in self._left.items()}
        except Fenced:
            raise
        except JobError as error:
            if not self._warned:
                log.warning("%s; old checkpoints stay, which costs space but not the run", error)
            self._warned = True

    def _find_doomed(self, kept: dict[str, Manifest]) -> list[str]:
        needed = {entry.key for manifest in kept.values() for entry in manifest.files.values()}
        stay, newest = {key.removesuffix("manifest.json") for key in kept}, int(next(iter(kept.values())).about["step"])
        folders = (folder for folder in self._objects.list_folders("checkpoints/") if folder not in stay)
        over = [folder for folder in folders if self._is_over(folder, newest)]
        for folder in over:
            if folder not in self._left:
                self._left[folder] = {item.key for item in self._objects.list(folder)}
        return [key for folder in over for key in sorted(self._left[folder] - needed)]

    def _is_over(self, folder: str, newest: int) -> bool:
        """Tell whether nobody writes the folder any more.

        All ranks upload the same steps in the same order: what this attempt began before the newest was retired. Later
        steps are being written.
        """
        began = parse_name(f"{folder}manifest.json")
        return began is not None and began < (self._epoch, newest)

    def _delete(self, doomed: list[str]) -> None:
        if not doomed:
            return
        verify_owner(self._objects, self._epoch, self._nonce)
        failpoint("retire-manifest")
        self._objects.delete([key for key in doomed if key.endswith("/manifest.json")])
        failpoint("retire-objects")
        self._objects.delete([key for key in doomed if not key.endswith("/manifest.json")])
        failpoint("retired")
