"""Moving sets of files: upload in parallel, download only what verifies."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

from job.errors import JobError, NotFound, NoValidCheckpoint, ResourceExhausted, SecurityRefused
from job.store.held import HeldFile
from job.store.manifest import Manifest, ManifestEntry, hash_file, keep_digests, match_digests
from job.store.objects import SizeDiffers, Store, check_key
from job.store.parallel import LARGE_AT_A_TIME, SMALL_AT_A_TIME, run_parallel

log = logging.getLogger("job.store")

_SMALL_BYTES = 1 << 20
_GLANCE_BYTES = 1 << 16
_UNFINISHED = re.compile(r".+\.[0-9a-f]{32}\.partial")
_DEAD_S = 3600.0
"""A download to whose file nothing was written for so long has no process any more: it would have been given up."""

_Work = tuple[int, Callable[[], object]]
"""What moves so many bytes."""


def upload_files(store: Store, folder: Path, entries: Mapping[str, ManifestEntry]) -> None:
    """Upload files of `folder` to the keys of their entries; the first error is raised."""
    upload_sources(store, {entry.key: folder / path for path, entry in entries.items()})


def upload_sources(store: Store, sources: Mapping[str, Path | HeldFile]) -> None:
    """Upload key → file; those in memory are hashed at the same time. The first error is raised."""
    works: list[_Work] = [(file.size, partial(_hash, file)) for file in sources.values() if isinstance(file, HeldFile)]
    works += [(_measure(source), partial(store.upload, source, key)) for key, source in sources.items()]
    _do_all(works)


def _hash(file: HeldFile) -> str:
    return file.sha256  # which it remembers


def _measure(source: Path | HeldFile) -> int:
    if isinstance(source, HeldFile):
        return source.size
    with suppress(OSError):
        return source.stat().st_size
    return 0  # the upload says what is wrong with it


def _do_all(works: Collection[_Work]) -> None:
    """Do what moves large files, few at a time, then what moves small ones, many at a time; raise the first error."""
    large, small = ([work for size, work in works if (size <= _SMALL_BYTES) == is_small] for is_small in (False, True))
    run_parallel(LARGE_AT_A_TIME, lambda work: work(), large)
    run_parallel(SMALL_AT_A_TIME, lambda work: work(), small)


def download_files(store: Store, manifest: Manifest, folder: Path, only: Collection[str] | None = None) -> None:
    """Download files of a manifest into `folder` and verify size and sha256 of each.

    A file that already lies there with the right digest is kept. Raises NoValidCheckpoint (17)
    naming the object that does not match, SecurityRefused (19) for a path that would leave `folder`.
    """
    wanted = {path: entry for path, entry in manifest.files.items() if only is None or path in only}
    folder.mkdir(parents=True, exist_ok=True)
    check = cache(partial(_check_place, os.path.realpath(folder)))  # thousands of files lie in few places
    targets = {path: _find_target(path, folder, check) for path in wanted}
    for place in set(map(os.path.dirname, targets.values())):
        _remove_leftovers(place)
    others = [
        path
        for path, entry in wanted.items()  # to hand a small file to a thread takes longer than to look at it
        if entry.size > _GLANCE_BYTES or not _lies_here(targets[path], entry)
    ]
    need = sum(wanted[path].size for path in others if _find_size(targets[path]) != wanted[path].size)
    if need > shutil.disk_usage(folder).free:
        raise ResourceExhausted(f"{folder}: {need >> 20} MiB to download do not fit; free space or move --work-dir")
    _do_all([(wanted[path].size, partial(_download_one, store, path, wanted[path], folder)) for path in others])


def _find_size(target: str) -> int | None:
    """Return the bytes of what lies here already, None where nothing does."""
    try:
        return os.lstat(target).st_size
    except OSError:
        return None


def _find_target(path: str, folder: Path, check: Callable[[str], None]) -> str:
    """Return where a file goes; `check` is asked about the folder in which that is."""
    target = f"{folder}/{check_key(path)}"
    check(os.path.dirname(target))
    return target


def _check_place(real: str, place: str) -> None:
    """Refuse (19) a place to which links lead out of the folder that is really `real`."""
    if not Path(os.path.realpath(place)).is_relative_to(real):
        raise SecurityRefused(f"what goes to {place!r} would be written outside {real}; refused")


def _name_unfinished(path: Path) -> Path:
    """Return what `path` is called until it is whole, in this process alone and known to nobody beforehand.

    Several fill one cache at the same time, in containers that number their processes alike, and a link that lay under
    this name would be written through.
    """
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")


def _remove_leftovers(place: str) -> None:
    """Remove what killed processes left of their downloads."""
    with suppress(OSError), os.scandir(place) as found:
        for item in found:
            if _UNFINISHED.fullmatch(item.name) and item.stat(follow_symlinks=False).st_mtime < time.time() - _DEAD_S:
                os.unlink(item)


def _download_one(store: Store, path: str, entry: ManifestEntry, folder: Path) -> None:
    target = Path(_find_target(path, folder, partial(_check_place, os.path.realpath(folder))))
    if _lies_here(target, entry):
        return
    unfinished = _name_unfinished(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # damaged on the way, perhaps: at rest it would come so again
            store.download(entry.key, unfinished, size=entry.size)
            if _matches(unfinished, entry):
                break
        else:
            raise NoValidCheckpoint(f"{store.uri}/{entry.key}: does not match its manifest (damaged); not used")
        os.replace(unfinished, target)
    except SizeDiffers:
        raise NoValidCheckpoint(f"{store.uri}/{entry.key}: does not match its manifest (damaged); not used") from None
    except NotFound:
        raise NoValidCheckpoint(f"{store.uri}/{entry.key}: named by the manifest but missing") from None
    except OSError as error:
        raise ResourceExhausted(f"cannot write {target}: {error.strerror}; free space or move --work-dir") from None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _lies_here(target: str | Path, entry: ManifestEntry) -> bool:
    """Tell whether a file is here already; what cannot be read is fetched anew. Refuse (19) a link in its place."""
    try:
        about = os.lstat(target)
        if stat.S_ISREG(about.st_mode):
            return about.st_size == entry.size and hash_file(target) == entry.sha256
    except OSError:
        return False
    if stat.S_ISLNK(about.st_mode):
        raise SecurityRefused(f"{str(target)!r} is a link, where it would be written outside its folder; refused")
    return False


def _matches(path: Path, entry: ManifestEntry) -> bool:
    return path.stat().st_size == entry.size and hash_file(path) == entry.sha256


def sweep_unfinished(store: Store, wanted: Callable[[str], bool] = lambda key: True) -> int:
    """Abort uploads that nobody finishes (`Store.sweep`); where the store does not let one look, say so and go on."""
    try:
        return store.sweep(wanted)
    except JobError as error:
        log.warning("uploads that were never finished could not be looked for: %s", error)
        return 0


def mirror_objects(store: Store, prefix: str, wanted: Callable[[str], bool], cache: Path) -> Path | None:
    """Return a folder with the objects below `prefix` whose key is `wanted`, as they are now; None where none is.

    The folder is named after keys, sizes and ETags, so what changed is fetched anew and what was removed is not
    there; it appears only when it is whole. Raises SecurityRefused (19) where a wanted key is no path, rather than
    leave its object out.
    """
    listed = (item for item in store.list(prefix, every=True) if not _marks_folder(item.key) and wanted(item.key))
    found = sorted((item.key, item.size, item.etag) for item in listed)
    if not found:
        return None
    folder = cache / hashlib.sha256(json.dumps(found).encode()).hexdigest()
    digests = folder.with_suffix(".json")  # beside it: whatever lies in it is taken for the store's
    if not match_digests(folder, digests):
        with build_folder(folder) as partial:
            for key, _, _ in found:
                (partial / check_key(key)).parent.mkdir(parents=True, exist_ok=True)
                store.download(key, partial / key)
            keep_digests(partial, digests)
            if not match_digests(folder, digests):
                shutil.rmtree(folder, ignore_errors=True)
    return folder


def _marks_folder(key: str) -> bool:
    """Tell whether an object is what consoles write to show an empty folder."""
    return not key or key.endswith("/")


@contextmanager
def build_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that is named `folder` once it is whole; where another process was faster, that one's stays."""
    partial = _name_unfinished(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:  # else every try of a full disk, or of a store that is out, leaves one more
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        os.rename(partial, folder)
    except OSError:  # it is named after what it holds, so theirs is the same
        shutil.rmtree(partial)


def verify_objects(store: Store, manifest: Manifest, scratch: Path) -> list[str]:
    """Download every object of a manifest in turn and return one sentence for each that does not match."""
    problems = []
    scratch.mkdir(parents=True, exist_ok=True)
    for path, entry in sorted(manifest.files.items()):
        copy = scratch / "object"
        copy.unlink(missing_ok=True)
        try:
            store.download(entry.key, copy)
            if not _matches(copy, entry):
                problems.append(f"{entry.key}: size or sha256 differs from the manifest ({path})")
        except NotFound:
            problems.append(f"{entry.key}: missing ({path})")
        copy.unlink(missing_ok=True)
    return problems
