"""A store in a local folder: one file an object, written beside and renamed into place.

Conditional writes take a lock on the folder (flock), so they hold between processes of one machine.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

from job.errors import AccessDenied, JobError, NotFound, RecipeError, ResourceExhausted, SecurityRefused, Unreachable
from job.store.held import HeldFile
from job.store.objects import (
    Blob,
    ObjectInfo,
    PreconditionFailed,
    SizeDiffers,
    check_key,
    check_prefix,
    check_read_size,
    is_plain,
)

_PARTIAL = ".partial-"
_LOCK_WAIT_S = 60.0
"""A lock is held for the time of a rename; who waits longer waits for a process that was stopped in it."""
_LOCK_POLL_S = 0.01
_COPY_BYTES = 1 << 20
_TRIES = 100
"""Other processes remove empty folders; none does so again and again just before something is written there."""


class FolderStore:
    """A folder; see `job.store.objects.Store` for the methods. The folder is made on the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = str(self.root)

    def read(self, key: str) -> Blob | None:
        try:
            path = self._path(key)
            check_read_size(self.uri, key, self._measure(path))
            data = path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        except OSError as error:
            self._raise(f"read {key}", error)
        return Blob(data, _etag(data))

    def _measure(self, path: Path) -> int:
        """Return a file's size; raise SecurityRefused (19) for a pipe or a device, which may have no end."""
        about = path.stat()
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
            name = path.relative_to(self.root)
            raise SecurityRefused(f"{self.uri}: {name} is a pipe or a device; refused, find out who made it")
        return about.st_size

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        path = self._path(key)
        self._place(path, lambda temporary: temporary.write_bytes(data), lambda: self._check(key, if_absent, if_match))
        return _etag(data)

    def _check(self, key: str, if_absent: bool, if_match: str | None) -> None:
        found = self.read(key) if if_absent or if_match is not None else None
        if (if_absent and found) or (if_match is not None and (not found or found.etag != if_match)):
            raise PreconditionFailed(f"{self.uri}: cannot write {key}: another writer was faster")

    def upload(self, source: Path | HeldFile, key: str) -> None:
        def fill(temporary: Path) -> None:
            if isinstance(source, Path):
                shutil.copyfile(source, temporary)
                return
            with source.open() as held, temporary.open("wb") as file:
                shutil.copyfileobj(held, file, _COPY_BYTES)

        self._place(self._path(key), fill)

    def download(self, key: str, path: Path, *, size: int | None = None) -> None:
        try:
            found = self._measure(self._path(key))
            if size is not None and found != size:
                raise SizeDiffers(f"{self.uri}: {key} has {found} bytes instead of {size}")
            shutil.copyfile(self._path(key), path)
        except FileNotFoundError:
            raise NotFound(f"{self.uri}: no object {key}") from None
        except OSError as error:
            self._raise(f"download {key}", error)

    def list(self, prefix: str, *, every: bool = False) -> Iterator[ObjectInfo]:
        parent = check_prefix(prefix).rpartition("/")[0]
        base = self._path(parent) if parent else self.root
        for folder, names, files in os.walk(base, onerror=self._raise_unlistable):
            names.sort()
            for name in sorted(files):
                path = Path(folder, name)
                key = path.relative_to(self.root).as_posix()
                if not key.startswith(prefix) or name.startswith(_PARTIAL) or not (every or is_plain(key)):
                    continue
                with suppress(FileNotFoundError):  # deleted meanwhile
                    about = path.lstat()
                    if stat.S_ISREG(about.st_mode):
                        yield ObjectInfo(key, about.st_size, about.st_mtime)

    def list_folders(self, prefix: str) -> Iterator[str]:
        parts = (item.key.removeprefix(prefix).partition("/") for item in self.list(prefix))
        yield from sorted({f"{prefix}{name}/" for name, slash, _ in parts if slash})

    def delete(self, keys: Sequence[str]) -> None:
        paths = {key: self._path(key) for key in keys}
        for key, path in paths.items():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self._raise(f"delete {key}", error)
        for folder in {path.parent for path in paths.values()}:
            self._remove_empty(folder)

    def _remove_empty(self, folder: Path) -> None:
        """Remove a folder and those above it as far as they hold nothing; the store's own stays."""
        with suppress(OSError):  # it holds something
            while folder != self.root:
                folder.rmdir()
                folder = folder.parent

    def sweep(self, wanted: Callable[[str], bool] = lambda key: True) -> int:
        found = os.walk(self.root, onerror=self._raise_unlistable)  # unlike rglob, it bears folders that go meanwhile
        leftovers = (Path(place, name) for place, _, names in found for name in names if name.startswith(_PARTIAL))
        return sum(_remove_leftover(path) for path in leftovers if wanted(path.relative_to(self.root).as_posix()))

    def _path(self, key: str) -> Path:
        path = self.root / check_key(key)
        real = Path(os.path.realpath(path))  # unlike Path.resolve, it survives a loop of symlinks
        if path.name.startswith(_PARTIAL) or not real.is_relative_to(os.path.realpath(self.root)):
            raise SecurityRefused(f"{self.uri}: key {key!r} leads out of the store; refused")
        return path

    def _place(self, path: Path, fill: Callable[[Path], object], check: Callable[[], None] = lambda: None) -> None:
        """Fill a temporary file beside `path`, flush it to disk, check, rename it into place.

        The store is locked from the check to the rename only: whoever is stopped while it writes blocks nobody.
        """
        temporary = path.with_name(_PARTIAL + uuid.uuid4().hex)
        try:
            with _open_new(temporary) as held:
                self._lock(held.fileno())  # tells `sweep` that somebody alive is at it
                fill(temporary)
                os.fsync(held.fileno())
                with self._locked():
                    check()
                    os.replace(temporary, path)
            _flush_folder(path.parent)
        except OSError as error:
            self._raise(f"write {path.name}", error)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold a lock on the folder itself, so that no lock file lies among the objects."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            self._raise("open the folder", error)
        try:
            self._lock(handle)
            try:
                yield
            finally:
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone leaves it to a process that was forked meanwhile
        finally:
            os.close(handle)

    def _lock(self, handle: int) -> None:
        deadline = time.monotonic() + _LOCK_WAIT_S
        try:
            while not _try_lock(handle):
                if time.monotonic() > deadline:
                    raise Unreachable(
                        f"{self.uri}: another process has held the folder's lock for {_LOCK_WAIT_S:.0f} s; it is "
                        f"probably stopped (`fuser {self.uri}` names it): end it, then run again"
                    )
                time.sleep(_LOCK_POLL_S)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                self._raise("lock the folder", error)
            raise RecipeError(
                f"store.uri: {self.uri} lies on a file system without locks ({error.strerror}), so two attempts could "
                "not be kept apart; use a local disk or s3://bucket/prefix"
            ) from None

    def _raise_unlistable(self, error: OSError) -> None:
        """An unreadable folder must not look empty: emptiness is taken as proof that nothing was written."""
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            self._raise("list", error)

    def _raise(self, what: str, error: OSError) -> NoReturn:
        raise _translate(error, f"{self.uri}: cannot {what}: {error.strerror}") from None


def _translate(error: OSError, what: str) -> JobError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied(f"{what}; give this user the right to write there, or choose another store.uri")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return NotFound(f"{what}; correct store.uri")
    return ResourceExhausted(f"{what}; free some space or choose another store.uri")


def _open_new(path: Path) -> BinaryIO:
    """Create a file and the folders above it, which go where another process deletes the last that lay in them."""
    tried = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("xb")
        except (FileNotFoundError, FileExistsError):  # the latter of a folder that was there and then was not
            tried += 1
            if tried == _TRIES:
                raise


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_leftover(path: Path) -> bool:
    """Remove a temporary file whose writer is gone: with it went its lock."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            return True
    except OSError:
        return False


def _flush_folder(folder: Path) -> None:
    """Make a rename outlive a power cut."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # what was written is deleted by now, and it was the last in its folder
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
