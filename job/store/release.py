"""Releases: publishing a bundle (call 15 of `commit.py`), and finding one again."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from job.errors import CheckpointMismatch, Fenced, JobError, SecurityRefused
from job.failpoints import failpoint
from job.store.manifest import Manifest, describe_files, list_files
from job.store.objects import PreconditionFailed, Store, check_key, open_room, open_store
from job.store.promotion import ModelPointer
from job.store.records import Contention, Record, read_record
from job.store.restore import find_missing, require_manifest
from job.store.transfer import sweep_unfinished, upload_files

if TYPE_CHECKING:
    from job.recipe.schema import Store as Address  # to build its classes takes time that most verbs have not

log = logging.getLogger("job.store")

Verify = Callable[[], None]
"""Raises Fenced (76) when the caller does not own its run any more."""


def publish_release(
    address: Address, folder: Path, about: Record, verify: Verify, proven: dict[str, str] | None = None
) -> str:
    """Upload the bundle in `folder` as an immutable version of a model; return the version.

    `about` goes into the manifest: name (of the model), run_id, and where all comes from.
    The manifest that is written last also stays in `folder`. A version that exists already with the same manifest is
    left as it is. Raises SecurityRefused (19) where `proven` (path → sha256) is given and the folder differs.
    """
    paths = [path for path in list_files(folder) if path != "manifest.json"]
    entries = describe_files(folder, paths, "")
    if proven is not None:
        _refuse_changed(folder, {path: entry.sha256 for path, entry in entries.items()}, proven)
    manifest = Manifest("release", entries, about)
    name, run_id = about["name"], about["run_id"]
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    version = f"{run_id}-{manifest.sha256[:8]}"
    objects, model = open_room(address, f"models/{name}/{version}"), open_room(address, f"models/{name}")
    own = re.compile(re.escape(run_id) + "-[0-9a-f]{8}/")  # versions that earlier attempts of this run began to upload
    sweep_unfinished(model, lambda key: bool(own.match(key)))
    _delete_halves(model, lambda folder: folder != f"{version}/" and bool(own.fullmatch(folder)), verify)
    failpoint("release-files")
    upload_files(objects, folder, entries)
    verify()
    failpoint("release-manifest")
    _write_manifest(objects, manifest.to_bytes())
    failpoint("release-manifest-written")
    _withdraw_if_fenced(objects, manifest, verify)
    return version


def _delete_halves(model: Store, is_own: Callable[[str], bool], verify: Verify) -> None:
    """Delete the versions that were never finished: they have no manifest, so nobody lists, follows or prunes them.

    What cannot be deleted costs space, not the run. Raises Fenced (76) where the caller does not own its run any more.
    """
    try:
        standing = ModelPointer(model).read()
        followed = {f"{version}/" for version in (standing.version, *standing.before)}  # one whose manifest was lost
        for folder in [folder for folder in model.list_folders("") if is_own(folder) and folder not in followed]:
            if model.read(f"{folder}manifest.json") is None:
                keys = [item.key for item in model.list(folder)]
                verify()
                model.delete(keys)
                model.delete([f"{folder}manifest.json"])  # where who began it has woken up meanwhile and written it
    except Fenced:
        raise
    except JobError as error:
        log.warning("%s; what an attempt before left half uploaded stays, which costs space but not the run", error)


def _write_manifest(objects: Store, data: bytes) -> None:
    """Write a version's manifest; one that lies there already stays as it is, but a damaged one is replaced."""
    etag, contention = None, Contention(objects.uri, "manifest.json")
    while True:
        try:
            objects.write("manifest.json", data, if_absent=etag is None, if_match=etag)
            return
        except PreconditionFailed:
            found = objects.read("manifest.json")
        if found and found.data == data:
            log.info("%s is already there", objects.uri)
            return
        log.warning("%s/manifest.json is not what this run wrote (damaged): it is written anew", objects.uri)
        etag = found.etag if found else None
        contention.wait()


def _withdraw_if_fenced(objects: Store, manifest: Manifest, verify: Verify) -> None:
    """Take a manifest back whose files are gone: who slept before writing it has perhaps a successor that deleted them.

    Where all are there it stays, for the successor may have made the same version and follow it. Raises Fenced (76),
    also where nothing may be deleted: nobody follows such a version, and it cannot be promoted.
    """
    try:
        verify()
    except Fenced:
        with suppress(JobError):
            if find_missing(objects, manifest):
                objects.delete(["manifest.json"])
                if not find_missing(objects, manifest):  # the successor has finished the same version in between
                    objects.write("manifest.json", manifest.to_bytes(), if_absent=True)
        raise


def _refuse_changed(folder: Path, found: dict[str, str], proven: dict[str, str]) -> None:
    changed = sorted(path for path in {*found, *proven} if found.get(path) != proven.get(path))
    if changed:
        raise SecurityRefused(
            f"{folder / changed[0]}: was changed after the bundle had been proven; nothing is released. Find out who "
            "else writes into the work folder, then run again"
        )


def latest_release(uri: str, *, allow_http: bool = False) -> str:
    """Return the URI of a release: `uri` itself when it holds a manifest, else what its current.json names."""
    uri = uri.rstrip("/")
    pointer = read_record(open_store(uri, allow_http=allow_http), "current.json")
    if pointer is None:
        return uri
    if "version" not in pointer:
        raise CheckpointMismatch(f"{uri}: is a run, not a model; name …/models/<name> or a folder")
    return f"{uri}/{check_key(str(pointer['version']))}"


def read_release_manifest(uri: str, *, allow_http: bool = False) -> tuple[Store, Manifest]:
    """Return the store opened at a release or checkpoint folder's root, and its manifest.

    The keys of a checkpoint's entries are relative to its run, two levels up; those of a release to itself.
    """
    objects = open_store(uri, allow_http=allow_http)
    manifest = require_manifest(objects, "manifest.json")
    if manifest.kind == "checkpoint":
        return open_store(uri.rstrip("/").rsplit("/", 2)[0], allow_http=allow_http), manifest
    return objects, manifest
