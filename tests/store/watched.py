"""A store whose every change a test is told of, and may forbid."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from job.store import Store
from job.store.held import HeldFile
from job.store.objects import Blob, ObjectInfo

Hook = Callable[[str, str], None]


class WatchedStore:
    """A store that calls `before` each change with (method, key) and `after` it, and otherwise is the one inside."""

    def __init__(self, inside: Store, before: Hook = lambda *_: None, after: Hook = lambda *_: None) -> None:
        self._inside, self.uri = inside, inside.uri
        self._before, self._after = before, after
        self._lock = threading.Lock()

    def read(self, key: str) -> Blob | None:
        return self._inside.read(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._inside.list(prefix)

    def list_folders(self, prefix: str) -> Iterator[str]:
        return self._inside.list_folders(prefix)

    def download(self, key: str, path: Path, *, size: int | None = None) -> None:
        self._inside.download(key, path, size=size)

    def sweep(self) -> int:
        return self._inside.sweep()

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        with self._lock:
            self._before("write", key)
            etag = self._inside.write(key, data, if_absent=if_absent, if_match=if_match)
            self._after("write", key)
            return etag

    def upload(self, path: Path | HeldFile, key: str) -> None:
        with self._lock:
            self._before("upload", key)
            self._inside.upload(path, key)
            self._after("upload", key)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            with self._lock:
                self._before("delete", key)
                self._inside.delete([key])
                self._after("delete", key)
