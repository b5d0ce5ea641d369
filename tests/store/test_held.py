"""A file that lies in memory is the file that it would be on disk, whoever reads it while it goes there."""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.store.held import HeldFile

PARTS = st.lists(st.binary(max_size=20), max_size=8)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(-1, 70)),
        st.tuples(st.just("seek"), st.integers(0, 90)),
        st.tuples(st.just("move"), st.just(0)),
    ),
    max_size=12,
)


@given(parts=PARTS, steps=STEPS)
def test_it_reads_as_the_file_would_before_and_after_it_went_to_disk(
    parts: list[bytes], steps: list[tuple[str, int]]
) -> None:
    whole = b"".join(parts)
    with TemporaryDirectory() as place:
        held = HeldFile([memoryview(part) for part in parts], Path(place) / "file")
        stream, same = held.open(), io.BytesIO(whole)
        for action, number in steps:
            if action == "read":
                assert stream.read(number) == same.read(number)
            elif action == "seek":
                assert stream.seek(number) == same.seek(number)
            else:
                held.move_to_disk()
            assert stream.tell() == same.tell()
        assert (held.size, held.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
        assert stream.seek(0, io.SEEK_END) == len(whole)


def test_readers_never_see_what_the_memory_is_used_for_next(tmp_path: Path) -> None:
    memory, whole = bytearray(1 << 20), b"a" * (1 << 20)
    for number in range(20):
        memory[:] = whole
        held, over = HeldFile([memoryview(memory)], tmp_path / str(number)), Event()

        def read(held: HeldFile, over: Event, began: Event) -> bool:
            right = True
            while not over.is_set():
                right &= held.read(1000, 500_000) == whole[:500_000]
                began.set()
            return right

        with ThreadPoolExecutor(3) as pool:
            begun = [Event() for _ in range(3)]
            readers = [pool.submit(read, held, over, began) for began in begun]
            assert all(began.wait(60) for began in begun)
            held.move_to_disk()
            memory[:] = b"b" * len(memory)
            over.set()
            assert all(reader.result() for reader in readers)


class SlowDisk:
    """A place on a disk that takes a part when it is told to."""

    def __init__(self, path: Path) -> None:
        self._path, self.writing, self.go_on = path, Event(), Event()

    def open(self, mode: str) -> Any:
        file = self._path.open(mode)
        write = file.write

        def wait(part: bytes) -> int:
            self.writing.set()
            assert self.go_on.wait(60)
            return write(part)

        return _Written(file, wait)

    def unlink(self, missing_ok: bool) -> None:
        self._path.unlink(missing_ok)


class _Written:
    def __init__(self, file: Any, write: Any) -> None:
        self._file, self.write = file, write

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@pytest.fixture
def slow(tmp_path: Path) -> tuple[HeldFile, SlowDisk, Thread]:
    """A file of two parts on its way to a disk that has not taken the first yet."""
    disk = SlowDisk(tmp_path / "file")
    held = HeldFile([memoryview(b"one"), memoryview(b"two")], disk)  # type: ignore[arg-type]
    mover = Thread(target=held.move_to_disk, daemon=True)
    mover.start()
    assert disk.writing.wait(60)
    return held, disk, mover


def test_who_reads_does_not_wait_for_the_disk(slow: tuple[HeldFile, SlowDisk, Thread], tmp_path: Path) -> None:
    held, disk, mover = slow
    assert held.read(0, 6) == b"onetwo"
    disk.go_on.set()
    mover.join(60)
    assert held.is_free.is_set() and (tmp_path / "file").read_bytes() == b"onetwo"


def test_what_is_sent_meanwhile_is_not_written_to_its_end(
    slow: tuple[HeldFile, SlowDisk, Thread], tmp_path: Path
) -> None:
    held, disk, mover = slow
    dropper = Thread(target=held.drop, daemon=True)
    dropper.start()
    dropper.join(0.2)
    assert not held.is_free.is_set(), "the disk still reads the memory"
    disk.go_on.set()
    dropper.join(60)
    mover.join(60)
    assert held.is_free.is_set() and (tmp_path / "file").read_bytes() == b"one"
