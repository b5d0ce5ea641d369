"""Writing a checkpoint: each rank's side of calls 8–13 of the commit protocol (`commit.py`).

An unchanged file is not sent again: its entry names the object of the checkpoint before the last.
Two neighbours never share an object, so no single damaged object costs both.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from job.errors import JobError, NoValidCheckpoint, PeerLost
from job.failpoints import failpoint
from job.store.commit import move_pointer
from job.store.held import HeldFile
from job.store.lease import verify_owner
from job.store.manifest import Manifest, ManifestEntry, describe_files, is_whole, list_files
from job.store.objects import PreconditionFailed
from job.store.parallel import SMALL_AT_A_TIME, run_parallel
from job.store.records import Record, new_nonce
from job.store.restore import name_manifest, read_manifest
from job.store.retention import Retention
from job.store.runs import RunStore
from job.store.transfer import upload_sources

log = logging.getLogger("job.store")

_NONE_HELD: Mapping[str, HeldFile] = MappingProxyType({})

_POLL_S = 0.2
_KEPT_EVENTS = 200


class CheckpointWriter:
    """One rank's side. `attempt` is what attempt.json says: epoch, nonce, keep, peer_timeout_s, and more."""

    def __init__(self, store: RunStore, rank: int, world_size: int, attempt: Record) -> None:
        self._store, self._rank, self._world_size, self._attempt = store, rank, world_size, attempt
        self._epoch, self._nonce = int(attempt["epoch"]), str(attempt["nonce"])
        self._etag: str | None = None
        self._retention = Retention(store.objects, self._epoch, self._nonce)
        self._committed: dict[str, Manifest] | None = None
        self._events: list[Record] = []

    def commit(self, folder: Path, step: int, about: Record, held: Mapping[str, HeldFile] = _NONE_HELD) -> None:
        """Upload this rank's files of `folder` (calls 8–9); on rank 0 also make them current (10–13).

        Those that are `held` (path → file) may lie in memory instead.
        """
        began = time.monotonic()
        name = f"checkpoints/e{self._epoch:04d}-s{step:08d}-{self._nonce[:8]}"
        entries = describe_files(folder, [path for path in list_files(folder) if path not in held], name)
        known = self._find_unchanged(entries)
        failpoint("files-upload")
        sources: dict[str, Path | HeldFile] = {f"{name}/{path}": file for path, file in held.items()}
        sources |= {entry.key: folder / path for path, entry in entries.items() if path not in known}
        upload_sources(self._store.objects, sources)
        failpoint("files-uploaded")
        failpoint("rank-part")
        entries |= {path: ManifestEntry(file.size, file.sha256, f"{name}/{path}") for path, file in held.items()}
        listed = {path: vars(entry) for path, entry in (entries | known).items()}
        self._store.write_json(f"{name}/rank-{self._rank:05d}.json", listed)
        failpoint("rank-part-written")
        if self._rank == 0:
            self._publish(name, step, about, began)

    def _find_unchanged(self, entries: dict[str, ManifestEntry]) -> dict[str, ManifestEntry]:
        """Return the entries whose content the checkpoint before the last holds, with the key that it has there."""
        committed = list(self._load_committed().values()) if self._rank == 0 else []
        before = committed[1].files if len(committed) > 1 else {}
        return {
            path: replace(entry, key=before[path].key)
            for path, entry in entries.items()
            if path in before and (before[path].sha256, before[path].size) == (entry.sha256, entry.size)
        }

    def _load_committed(self) -> dict[str, Manifest]:
        """Return key → manifest of what is committed and kept, newest first; at first what an attempt before left."""
        if self._committed is None:
            found = {}
            for entry in self._attempt.get("committed") or []:
                key, sha256 = entry["manifest"], entry["manifest_sha256"]
                with suppress(NoValidCheckpoint):  # damaged meanwhile: it does not count among the last K
                    found[key] = read_manifest(self._store.objects, key, sha256)
            self._committed = found  # only now: after an outage in between, all are read again
        return self._committed

    def _publish(self, name: str, step: int, about: Record, began: float) -> None:
        manifest = Manifest("checkpoint", self._gather(name), {**about, "step": step, "epoch": self._epoch})
        key = f"{name}/manifest.json"
        failpoint("manifest")
        with suppress(PreconditionFailed):  # one's own write whose answer was lost: the folder has this attempt's nonce
            self._store.objects.write(key, manifest.to_bytes(), if_absent=True)
        failpoint("manifest-written")
        failpoint("pointer")
        kept = dict(list(({key: manifest} | self._load_committed()).items())[: int(self._attempt["keep"])])
        self._etag = move_pointer(self._store.objects, self._point_at(kept), self._etag)
        failpoint("pointer-moved")
        log.info("checkpoint of step %d committed (%d MiB)", step, manifest.total_bytes >> 20)
        self._committed = kept
        self._note({"event": "checkpoint committed", "step": step, "seconds": round(time.monotonic() - began, 2)})
        self._retention.retire(kept)

    def _point_at(self, kept: dict[str, Manifest]) -> Record:
        """Return what current.json says after this commit (`since`: older epochs were given up)."""
        newest, *older = [name_manifest(key, manifest.sha256) for key, manifest in kept.items()]
        mine = {"epoch": self._epoch, "attempt": self._nonce, "nonce": new_nonce()}
        step = next(iter(kept.values())).about["step"]
        return {"since": int(self._attempt.get("since") or 0), "step": step, "older": older} | newest | mine

    def _gather(self, name: str) -> dict[str, ManifestEntry]:
        """Wait for every rank's list of files (call 10) and return their union."""
        deadline = time.monotonic() + float(self._attempt["peer_timeout_s"])
        parts: dict[int, dict[str, ManifestEntry]] = {}

        def await_part(rank: int) -> None:
            parts[rank] = self._await_part(name, rank, deadline)

        run_parallel(SMALL_AT_A_TIME, await_part, range(self._world_size))
        return {path: entry for rank in sorted(parts) for path, entry in parts[rank].items()}

    def _await_part(self, name: str, rank: int, deadline: float) -> dict[str, ManifestEntry]:
        pause_s = _POLL_S
        while (part := self._read_part(f"{name}/rank-{rank:05d}.json")) is None:
            if time.monotonic() > deadline:
                # perhaps a new owner has cleared away what was there
                verify_owner(self._store.objects, self._epoch, self._nonce)
                raise PeerLost(
                    f"rank {rank} did not upload its part of {name}, or not whole, within "
                    f"{self._attempt['peer_timeout_s']:.0f} s (store.max_unsynced_minutes + launch.hang_timeout_s); "
                    "see that rank's log, then run again"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 5.0)
        return part

    def _read_part(self, key: str) -> dict[str, ManifestEntry] | None:
        """Return a rank's list of files; None where it is not there yet, or comes damaged, perhaps for once."""
        try:
            listed = self._store.read_json(key)
            part = None if listed is None else {path: ManifestEntry(**entry) for path, entry in listed.items()}
        except (NoValidCheckpoint, TypeError):
            return None
        return part if part is None or all(map(is_whole, part.values())) else None

    def _note(self, event: dict[str, Any]) -> None:
        """Tell `job show --events`; nothing depends on it."""
        self._events = [*self._events, event | {"at": datetime.now(UTC).isoformat(timespec="milliseconds")}]
        self._events = self._events[-_KEPT_EVENTS:]
        try:
            self._store.write_json(f"attempts/{self._epoch}-checkpoints.json", {"events": self._events})
        except JobError as error:
            log.warning("the event could not be noted: %s", error)
