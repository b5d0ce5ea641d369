"""Finding the newest checkpoint that is whole, and fetching it: call 7 of the commit protocol (`commit.py`).

What current.json names comes first, then what was committed before it (its `older`), then whatever
manifest is listed by (epoch, step), newest first. A training begins anew only where nothing was ever
committed and an authenticated LIST shows nothing.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from job.errors import NotFound, NoValidCheckpoint, SecurityRefused
from job.store.manifest import Manifest
from job.store.objects import Store, check_key
from job.store.records import Record, read_again
from job.store.transfer import download_files

log = logging.getLogger("job.store")

_NAME = re.compile(r"checkpoints/e(\d{4,})-s(\d{8,})-[0-9a-f]{8}/manifest\.json")


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was fetched and verified, the newer ones that were not whole, and what was committed before.

    `committed` begins with this one and goes back in time; its entries are {manifest, manifest_sha256}.
    """

    key: str
    manifest: Manifest
    damaged: list[str]
    committed: list[Record]


def restore_newest(objects: Store, pointer: Record, folder: Path, max_bytes: int) -> Restored | None:
    """Fetch all files of the newest whole checkpoint into `folder`; None where there is proof that there is none.

    Raises NoValidCheckpoint (17) when checkpoints exist but none is whole, SecurityRefused (19) for a
    manifest that claims more than `max_bytes` or names hostile paths.
    """
    problems: dict[str, str] = {}
    for key, sha256 in _candidates(objects, pointer):
        try:
            manifest = fetch_checkpoint(objects, key, sha256, folder, max_bytes=max_bytes)
            _check_about(objects, key, manifest)
        except NoValidCheckpoint as error:
            log.warning("%s; the next older checkpoint is tried", error)
            problems[key] = str(error)
            shutil.rmtree(folder, ignore_errors=True)
            continue
        damaged = [other for other in problems if other != key]
        older = [entry for entry in list_older(pointer) if entry["manifest"] not in (key, *problems)]
        return Restored(key, manifest, damaged, [name_manifest(key, sha256 or manifest.sha256), *older])
    if not problems and pointer["manifest"] is None and not pointer.get("lost"):
        return None
    first = next(iter(problems.values()), "current.json was damaged and no manifest is there")
    raise NoValidCheckpoint(
        f"{objects.uri}: none of {len(problems)} checkpoint(s) is whole ({first}); restore the objects, or begin anew "
        "with --fresh"
    )


def _check_about(objects: Store, key: str, manifest: Manifest) -> None:
    numbers = (manifest.about.get("step"), manifest.about.get("world_size"))
    if manifest.kind != "checkpoint" or not all(type(number) is int and number >= 0 for number in numbers):
        raise NoValidCheckpoint(f"{objects.uri}/{key}: is no checkpoint's manifest (no step, no world size)")


def name_manifest(key: str, sha256: str) -> Record:
    """Return the entry by which a pointer names a manifest."""
    return {"manifest": key, "manifest_sha256": sha256}


def list_older(pointer: Record) -> list[Record]:
    """Return the entries of the checkpoints that were committed before the pointer's and are kept, newest first."""
    entries = pointer.get("older")
    whole = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return [entry for entry in whole if all(isinstance(entry.get(key), str) for key in name_manifest("", ""))]


def fetch_checkpoint(
    objects: Store,
    key: str,
    sha256: str | None,
    folder: Path,
    *,
    only: Callable[[str], bool] = lambda path: True,
    max_bytes: int | None = None,
) -> Manifest:
    """Download the files of a checkpoint whose path satisfies `only`; every size and sha256 is verified.

    `sha256` is the manifest's digest where a pointer names it; else its own seal must hold.
    """
    manifest = read_manifest(objects, key, sha256)
    if max_bytes is not None and manifest.total_bytes > max_bytes:
        raise SecurityRefused(
            f"{objects.uri}/{key}: claims {manifest.total_bytes >> 20} MiB, more than any checkpoint of this model "
            f"({max_bytes >> 20} MiB); refused, nothing was downloaded"
        )
    download_files(objects, manifest, folder, [path for path in manifest.files if only(path)])
    return manifest


def read_manifest(objects: Store, key: str, sha256: str | None = None) -> Manifest:
    """Return a manifest; NoValidCheckpoint (17) when it is gone, damaged, or not what a pointer names."""
    return read_again(partial(_read_manifest_once, objects, key, sha256))


def _read_manifest_once(objects: Store, key: str, sha256: str | None) -> Manifest:
    blob = objects.read(check_key(key))
    if blob is None:
        raise NoValidCheckpoint(f"{objects.uri}/{key}: is named but gone; pick another")
    return Manifest.parse(blob.data, f"{objects.uri}/{key}", sha256)


def parse_name(key: str) -> tuple[int, int] | None:
    """Return (epoch, step) of a checkpoint's manifest key, None for any other key."""
    match = _NAME.fullmatch(key)
    return (int(match.group(1)), int(match.group(2))) if match else None


def list_manifests(objects: Store) -> list[str]:
    """Return the keys of all checkpoints' manifests, newest first by (epoch, step)."""
    named = {item.key: parse_name(item.key) for item in objects.list("checkpoints/")}
    return sorted((key for key, name in named.items() if name), key=lambda key: named[key] or (0, 0), reverse=True)


def _candidates(objects: Store, pointer: Record) -> Iterator[tuple[str, str | None]]:
    """Yield (key, digest or None) in the order in which they are tried: what the pointer names, then what is listed.

    A key that the pointer names comes again where its digest is not the manifest's: one of both is wrong.
    """
    entries = [entry for entry in (pointer, *list_older(pointer)) if entry["manifest"]]
    for entry in entries:
        yield entry["manifest"], entry["manifest_sha256"]
    since, named = pointer.get("since") or 0, {entry["manifest"]: entry["manifest_sha256"] for entry in entries}
    for key in list_manifests(objects):
        if (parse_name(key) or (0, 0))[0] >= since and (key not in named or _differs(objects, key, named[key])):
            yield key, None


def _differs(objects: Store, key: str, sha256: str) -> bool:
    blob = objects.read(key)
    return blob is not None and hashlib.sha256(blob.data).hexdigest() != sha256


def require_manifest(objects: Store, key: str) -> Manifest:
    """Return a manifest that a user named; NotFound (13) when it is absent."""
    try:
        return read_manifest(objects, key)
    except NoValidCheckpoint:
        if objects.read(key) is None:
            raise NotFound(f"{objects.uri}/{key}: no such object; check the address with `job show`") from None
        raise


def find_missing(objects: Store, manifest: Manifest, prefix: str = "") -> list[str]:
    """Return the keys below `prefix` that a manifest names and nothing lies at; it costs one listing."""
    there = {item.key for item in objects.list(prefix, every=True)}
    return [key for entry in manifest.files.values() if (key := f"{prefix}{entry.key}") not in there]
