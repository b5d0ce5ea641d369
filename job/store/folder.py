"""A store in a local folder: one file an object, written beside and renamed into place.

Conditional writes take a lock on the folder (flock), so they hold between processes of one machine.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from job.errors import AccessDenied, JobError, NotFound, ResourceExhausted, SecurityRefused
from job.store.objects import Blob, ObjectInfo, PreconditionFailed, check_key, check_prefix

_PARTIAL = ".partial-"


class FolderStore:
    """A folder; see `job.store.objects.Store` for the methods. The folder is made on the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)

    def read(self, key: str) -> Blob | None:
        try:
            data = self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        except OSError as error:
            self._raise(f"read {key}", error)
        return Blob(data, _etag(data))

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        path = self._path(key)
        with self._locked():
            found = self.read(key) if if_absent or if_match is not None else None
            if (if_absent and found) or (if_match is not None and (not found or found.etag != if_match)):
                raise PreconditionFailed(f"{self.uri}: cannot write {key}: another writer was faster")
            self._place(path, lambda temporary: temporary.write_bytes(data))
        return _etag(data)

    def upload(self, path: Path, key: str) -> None:
        self._place(self._path(key), lambda temporary: shutil.copyfile(path, temporary))

    def download(self, key: str, path: Path) -> None:
        try:
            shutil.copyfile(self._path(key), path)
        except FileNotFoundError:
            raise NotFound(f"{self.uri}: no object {key}") from None
        except OSError as error:
            self._raise(f"download {key}", error)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        parent = check_prefix(prefix).rpartition("/")[0]
        base = self._path(parent) if parent else self.root
        for folder, names, files in os.walk(base, onerror=self._raise_unlistable):
            names.sort()
            for name in sorted(files):
                path = Path(folder, name)
                key = path.relative_to(self.root).as_posix()
                if (
                    key.startswith(prefix)
                    and path.is_file()
                    and not path.is_symlink()
                    and not name.startswith(_PARTIAL)
                ):
                    yield ObjectInfo(key, path.stat().st_size)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            try:
                self._path(key).unlink(missing_ok=True)
            except OSError as error:
                self._raise(f"delete {key}", error)

    def _path(self, key: str) -> Path:
        path = self.root / check_key(key)
        real = Path(os.path.realpath(path))  # unlike Path.resolve, it survives a loop of symlinks
        if path.name.startswith(_PARTIAL) or not real.is_relative_to(os.path.realpath(self.root)):
            raise SecurityRefused(f"{self.uri}: key {key!r} leads out of the store; refused")
        return path

    def _place(self, path: Path, fill: object) -> None:
        """Fill a temporary file beside `path`, flush it to disk, rename it into place."""
        temporary = path.with_name(_PARTIAL + uuid.uuid4().hex)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fill(temporary)  # type: ignore[operator]
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._raise(f"write {path.name}", error)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold a lock on the folder itself, so that no lock file lies among the objects."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            self._raise("open the folder", error)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

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


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
