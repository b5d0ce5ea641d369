"""The commit protocol: in which order objects are written, so that a reader never sees a half.

Layout under the store's URI (DESIGN §5):

    runs/<run-id>/run.json · current.json · result.json · status.json · report.html
    runs/<run-id>/checkpoints/e0001-s00000250-<nonce>/{…, rank-00000.json, manifest.json}
    runs/<run-id>/stages/<stage>.json
    models/<name>/<version>/{…, manifest.json} · models/<name>/current.json

A checkpoint, in the uploading threads, while training goes on:

    1. every rank   uploads its files                       crash: garbage that no manifest names
    2. every rank   PUT rank-NNNNN.json (path → entry)      crash: the same
    3. rank 0       polls until all rank-*.json are there, no collective
    4. rank 0       PUT manifest.json, If-None-Match        crash: whole, but not current
    5. rank 0       PUT current.json, If-Match              ← commit point
    6. rank 0       deletes checkpoints older than the last K that this attempt wrote, manifest first

A release, in the release stage on node 0: files, then manifest.json (If-None-Match), then the
pointer models/<name>/current.json (If-Match) when the release is promoted.

A 412 on a pointer may be one's own write whose answer was lost: read, compare the nonce.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from job.errors import CheckpointMismatch, Fenced, JobError, NotFound, NoValidCheckpoint, PeerLost
from job.store.manifest import Manifest, ManifestEntry, describe_files, list_files
from job.store.objects import Blob, PreconditionFailed, Store, check_key, open_store
from job.store.transfer import download_files, upload_files

log = logging.getLogger("job.store")

_POLL_S = 0.2


class RunStore:
    """The part of a store that belongs to one run; keys are relative to `runs/<run-id>`."""

    def __init__(self, uri: str, run_id: str, *, allow_http: bool = False) -> None:
        self.run_id = run_id
        self.objects: Store = open_store(f"{uri}/runs/{run_id}", allow_http=allow_http)

    @property
    def uri(self) -> str:
        """URI of the run's prefix."""
        return self.objects.uri

    def prove_reachable(self) -> None:
        """List the prefix once, so that a missing bucket or wrong key ends the run before it begins."""
        next(iter(self.objects.list("run.json")), None)

    def read_json(self, key: str) -> dict[str, Any] | None:
        """Return a small JSON object, or None where it is absent; a damaged one is 17."""
        blob = self.objects.read(key)
        return None if blob is None else _parse(blob, f"{self.uri}/{key}")

    def write_json(self, key: str, value: dict[str, Any]) -> None:
        """Write a small JSON object over whatever was there."""
        self.objects.write(key, _dump(value))

    def write_once(self, key: str, value: dict[str, Any]) -> dict[str, Any]:
        """Write unless something is there; return what lies there afterwards."""
        try:
            self.objects.write(key, _dump(value), if_absent=True)
            return value
        except PreconditionFailed:
            return self.read_json(key) or value

    def upload_report(self, path: Path, key: str) -> None:
        """Copy one file for people to look at; nothing depends on it."""
        self.objects.upload(path, key)

    def start_over(self, about: dict[str, Any], stages: list[str]) -> None:
        """Forget what was committed, so that no later attempt resumes from it: records, pointer, then run.json."""
        self.objects.delete([f"stages/{name}.json" for name in ("release", *reversed(stages))])
        nothing = {"epoch": self.next_epoch(), "step": 0, "manifest": None, "manifest_sha256": None}
        move_pointer(self.objects, nothing | {"nonce": uuid.uuid4().hex}, None)
        self.write_json("run.json", about)

    def current_checkpoint(self) -> dict[str, Any] | None:
        """Return the pointer {epoch, step, manifest, manifest_sha256, nonce}, or None before the first commit."""
        pointer = self.read_json("current.json")
        return None if pointer and pointer.get("manifest", "missing") is None else pointer

    def next_epoch(self) -> int:
        """Return an epoch above the standing pointer's, so that whoever wrote that is fenced; 1 where there is none."""
        return int(_parse_leniently(self.objects.read("current.json")).get("epoch", 0)) + 1

    def fetch_checkpoint(self, pointer: dict[str, Any], folder: Path, only: Callable[[str], bool]) -> Manifest:
        """Download and verify the files of a checkpoint whose path satisfies `only`; return its manifest."""
        key = check_key(str(pointer.get("manifest")))
        try:
            manifest = _read_manifest(self.objects, key)
        except NotFound:
            raise NoValidCheckpoint(
                f"{self.uri}/{key}: is named by current.json but gone; start with --fresh"
            ) from None
        if manifest.sha256 != pointer.get("manifest_sha256"):
            raise NoValidCheckpoint(f"{self.uri}/{key}: is not what current.json names; start with --fresh")
        download_files(self.objects, manifest, folder, [path for path in manifest.files if only(path)])
        return manifest


class CheckpointWriter:
    """One rank's side of the checkpoint protocol above. `nonce` and `epoch` are the attempt's."""

    def __init__(self, store: RunStore, rank: int, world_size: int, attempt: dict[str, Any]) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._epoch, self._nonce = int(attempt["epoch"]), str(attempt["nonce"])
        self._keep, self._peer_timeout_s = int(attempt["keep"]), float(attempt["peer_timeout_s"])
        self._etag: str | None = None
        self._written: list[tuple[str, Manifest]] = []
        self._skipped: list[str] = []

    def commit(self, folder: Path, step: int, about: dict[str, Any]) -> None:
        """Upload this rank's files of `folder` (calls 1–2); on rank 0 also make them current (3–6)."""
        name = f"checkpoints/e{self._epoch:04d}-s{step:08d}-{self._nonce[:8]}"
        entries = describe_files(folder, list_files(folder), name)
        upload_files(self._store.objects, folder, entries)
        self._store.write_json(f"{name}/rank-{self._rank:05d}.json", {p: asdict(e) for p, e in entries.items()})
        if self._rank == 0:
            self._publish(name, step, about)

    def _publish(self, name: str, step: int, about: dict[str, Any]) -> None:
        files = self._gather(name)
        if files is None:
            log.info("checkpoint of step %d skipped: a rank that was behind went on to a newer one", step)
            self._skipped.append(name)
            return
        manifest = Manifest("checkpoint", files, {**about, "step": step, "epoch": self._epoch})
        key = f"{name}/manifest.json"
        with suppress(PreconditionFailed):  # one's own write whose answer was lost: the folder has this attempt's nonce
            self._store.objects.write(key, manifest.to_bytes(), if_absent=True)
        pointer = {"epoch": self._epoch, "step": step, "manifest": key, "manifest_sha256": manifest.sha256}
        self._etag = move_pointer(self._store.objects, pointer | {"nonce": uuid.uuid4().hex}, self._etag)
        log.info("checkpoint of step %d committed (%d MiB)", step, manifest.total_bytes >> 20)
        self._written.append((name, manifest))
        self._retire()

    def _gather(self, name: str) -> dict[str, ManifestEntry] | None:
        """Wait for every rank's list of files (call 3) and return their union; None where a rank skipped this step."""
        files: dict[str, ManifestEntry] = {}
        deadline, pause_s = time.monotonic() + self._peer_timeout_s, _POLL_S
        for rank in range(self._world_size):
            key = f"{name}/rank-{rank:05d}.json"
            while (listed := self._store.read_json(key)) is None:
                if self._has_newer(rank, name):
                    return None
                if time.monotonic() > deadline:
                    raise PeerLost(f"rank {rank} did not upload its part of {name} within {self._peer_timeout_s:.0f} s")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 5.0)
            files |= {path: ManifestEntry(**entry) for path, entry in listed.items()}
        return files

    def _has_newer(self, rank: int, name: str) -> bool:
        """Tell whether a rank has uploaded its part of a later step: newest wins in every rank's queue by itself."""
        ending = f"-{self._nonce[:8]}/rank-{rank:05d}.json"
        parts = self._store.objects.list(f"checkpoints/e{self._epoch:04d}-s")
        return any(item.key.endswith(ending) and item.key > name for item in parts)

    def _retire(self) -> None:
        """Delete what only checkpoints beyond the last K of this attempt name (call 6)."""
        retired, self._written = self._written[: -self._keep], self._written[-self._keep :]
        kept = {entry.key for _, manifest in self._written for entry in manifest.files.values()}
        skipped, self._skipped = self._skipped, []
        try:
            for name, manifest in retired:
                keys = [entry.key for entry in manifest.files.values() if entry.key not in kept]
                ranks = [f"{name}/rank-{rank:05d}.json" for rank in range(self._world_size)]
                self._store.objects.delete([f"{name}/manifest.json"])
                self._store.objects.delete(keys + ranks)
            for name in skipped:  # every rank is past them: each uploads in order, and this newer one is whole
                self._store.objects.delete([item.key for item in self._store.objects.list(f"{name}/")])
        except JobError as error:
            log.warning("%s; an old checkpoint stays, which costs space but not the run", error)


def move_pointer(objects: Store, pointer: dict[str, Any], etag: str | None) -> str:
    """Swap current.json to `pointer`; `etag` is that of the pointer this writer wrote last, None at first.

    Returns the new ETag. Raises Fenced (76) when a newer epoch stands there. A damaged pointer is replaced.
    """
    while True:
        try:
            if etag is not None:
                return objects.write("current.json", _dump(pointer), if_match=etag)
            found = objects.read("current.json")
            standing = _parse_leniently(found)
            if found and standing.get("nonce") == pointer["nonce"]:
                return found.etag
            if standing.get("epoch", 0) > pointer.get("epoch", 0):
                raise Fenced(f"{objects.uri}: attempt {standing['epoch']} owns this run; this one stops")
            etag = found.etag if found else None
            return objects.write("current.json", _dump(pointer), if_absent=found is None, if_match=etag)
        except PreconditionFailed:
            etag = None


def publish_release(store_uri: str, name: str, run_id: str, folder: Path, *, allow_http: bool = False) -> str:
    """Upload the bundle in `folder` as an immutable version of model `name`; return the version.

    The manifest that is written last also stays in `folder`. A version that exists already with the
    same manifest is left as it is.
    """
    paths = [path for path in list_files(folder) if path != "manifest.json"]
    entries = {path: ManifestEntry(e.size, e.sha256, path) for path, e in describe_files(folder, paths, "").items()}
    manifest = Manifest("release", entries, {"name": name, "run_id": run_id})
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    version = f"{run_id}-{manifest.sha256[:8]}"
    objects = open_store(f"{store_uri}/models/{name}/{version}", allow_http=allow_http)
    upload_files(objects, folder, entries)
    try:
        objects.write("manifest.json", manifest.to_bytes(), if_absent=True)
    except PreconditionFailed:
        log.info("release %s is already there", version)
    return version


def promote_release(store_uri: str, name: str, version: str, *, allow_http: bool = False) -> None:
    """Move models/<name>/current.json to `version`."""
    objects = open_store(f"{store_uri}/models/{name}", allow_http=allow_http)
    move_pointer(objects, {"version": version, "nonce": uuid.uuid4().hex}, None)


def latest_release(uri: str, *, allow_http: bool = False) -> str:
    """Return the URI of a release: `uri` itself when it holds a manifest, else what its current.json names."""
    uri = uri.rstrip("/")
    objects = open_store(uri, allow_http=allow_http)
    blob = objects.read("current.json")
    if blob is None:
        return uri
    pointer = _parse(blob, f"{uri}/current.json")
    if "version" not in pointer:
        raise CheckpointMismatch(f"{uri}: is a run, not a model; name …/models/<name> or a folder")
    return f"{uri}/{check_key(str(pointer['version']))}"


def read_release_manifest(uri: str, *, allow_http: bool = False) -> tuple[Store, Manifest]:
    """Return the store opened at a release or checkpoint folder's root, and its manifest.

    The keys of a checkpoint's entries are relative to its run, two levels up; those of a release to itself.
    """
    objects = open_store(uri, allow_http=allow_http)
    manifest = _read_manifest(objects, "manifest.json")
    if manifest.kind == "checkpoint":
        return open_store(uri.rstrip("/").rsplit("/", 2)[0], allow_http=allow_http), manifest
    return objects, manifest


def _read_manifest(objects: Store, key: str) -> Manifest:
    blob = objects.read(key)
    if blob is None:
        raise NotFound(f"{objects.uri}/{key}: no such object; check the address with `job show`")
    return Manifest.parse(blob.data, f"{objects.uri}/{key}")


def _parse(blob: Blob, where: str) -> dict[str, Any]:
    try:
        value = json.loads(blob.data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise NoValidCheckpoint(f"{where}: not a JSON object (damaged); restore it or start with --fresh")
    return value


def _parse_leniently(blob: Blob | None) -> dict[str, Any]:
    """Return the pointer; what is no pointer counts as none, and its epoch as 0."""
    try:
        pointer = _parse(blob, "") if blob else {}
    except NoValidCheckpoint:
        pointer = {}
    return pointer if isinstance(pointer.get("epoch", 0), int) else pointer | {"epoch": 0}


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
