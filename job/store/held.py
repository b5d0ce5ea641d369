"""A file that lies in memory, and goes to disk only where its memory is needed before it has been sent.

An outage of the store, or one that is slow, then costs what it always did: room on the disk.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from threading import Event, Lock
from typing import Literal

from job.store.manifest import hash_stream


class HeldFile:
    """What `parts` hold, one after the other; `path` is where it goes if it must. Any thread may call.

    The memory may be used for something else once `is_free` is set: what is read then comes from the disk, or nobody
    reads any more.
    """

    def __init__(self, parts: Sequence[memoryview], path: Path) -> None:
        self.path, self.is_free = path, Event()
        self._parts, self._ends = list(parts), list(accumulate(len(part) for part in parts))
        self._lock, self._moving, self._unwanted = Lock(), Lock(), False

    @property
    def size(self) -> int:
        """In bytes."""
        return self._ends[-1] if self._ends else 0

    @cached_property
    def sha256(self) -> str:
        """Digest (hex) of what the file holds."""
        return hash_stream(self.open())

    def open(self, mode: Literal["rb"] = "rb") -> HeldReader:
        """Return a stream of what the file holds, from its beginning on; `mode` as in Path.open."""
        return HeldReader(self)

    def read(self, start: int, count: int) -> bytes:
        """Return `count` bytes from `start` on, fewer at the end."""
        with self._lock:
            if not self.is_free.is_set():
                return b"".join(self._slice(start, min(start + count, self.size)))
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(count)

    def _slice(self, start: int, end: int) -> Iterator[memoryview]:
        number = bisect_right(self._ends, start)
        while start < end:
            last, part = self._ends[number], self._parts[number]
            yield part[len(part) - (last - start) :][: end - start]
            start, number = last, number + 1

    def move_to_disk(self) -> None:
        """Write the file, unless its memory is free already; readers need not wait. An OSError leaves it in memory."""
        with self._moving:
            if self.is_free.is_set():
                return
            try:
                with self.path.open("wb") as file:
                    for part in self._parts:
                        if self._unwanted:
                            return
                        file.write(part)
            except OSError:
                self.path.unlink(missing_ok=True)
                raise
            self._let_go()

    def drop(self) -> None:
        """Free the memory: nobody reads the file any more, and what of it is on disk means nothing."""
        self._unwanted = True
        with self._moving:
            self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            self._parts = []
            self.is_free.set()


class HeldReader(io.RawIOBase):
    """A stream over a HeldFile, as boto3 wants it."""

    def __init__(self, file: HeldFile) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        self._place = begin + offset
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        count = self._file.size if size is None or size < 0 else size
        data = self._file.read(self._place, count)
        self._place += len(data)
        return data
