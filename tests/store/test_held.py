"""A file that lies in memory is the file that it would be on disk, whoever reads it while it goes there."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

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
    memory, over, wrong = bytearray(b"a" * (1 << 20)), Event(), []
    for number in range(20):
        memory[:] = b"a" * len(memory)
        held = HeldFile([memoryview(memory)], tmp_path / str(number))

        def read(held: HeldFile = held) -> None:
            while not over.is_set():
                if (data := held.read(1000, 500_000)) != b"a" * 500_000:
                    wrong.append(data)

        over.clear()
        readers = [Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        held.move_to_disk()
        memory[:] = b"b" * len(memory)
        over.set()
        for reader in readers:
            reader.join(60)
    assert not wrong
