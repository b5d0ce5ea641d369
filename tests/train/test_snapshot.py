"""A checkpoint is what the training was when it was saved, whatever the steps after it change while it is written."""

from __future__ import annotations

import gc
import mmap
import os
import time
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from safetensors.torch import load_file, save_file

from job.train.checkpoint import gather_weights
from job.train.snapshot import Snapshot


def test_what_is_written_is_the_state_at_the_save_and_not_that_of_later_steps(tmp_path: Path) -> None:
    weights, go_on = torch.arange(10.0), Event()
    snapshot = Snapshot(1024)
    snapshot.begin()
    kept = {"weights": snapshot.keep(weights)}

    def write() -> None:
        go_on.wait(60)
        save_file(kept, tmp_path / "kept.safetensors")

    written = snapshot.write(write)
    weights += 1  # a step, while nothing is written yet
    assert not written.done()
    go_on.set()
    assert written.result(60) >= 0
    assert torch.equal(load_file(tmp_path / "kept.safetensors")["weights"], torch.arange(10.0))


def test_every_save_has_the_same_memory_and_waits_until_the_one_before_is_written() -> None:
    snapshot, go_on, places = Snapshot(1024), Event(), []
    snapshot.begin()
    places.append(snapshot.keep(torch.ones(8)).data_ptr())
    snapshot.write(lambda: go_on.wait(60) and None)
    later = Thread(target=snapshot.begin, daemon=True)
    later.start()
    later.join(0.7)
    assert later.is_alive(), "its memory is still being written"
    go_on.set()
    later.join(60)
    places.append(snapshot.keep(torch.ones(8)).data_ptr())
    assert places[0] == places[1]


def test_a_process_is_forked_when_no_thread_of_a_save_can_hold_a_lock(tmp_path: Path) -> None:
    snapshot = Snapshot(1024)
    snapshot.begin()

    def write() -> None:
        time.sleep(0.7)
        (tmp_path / "written").touch()

    snapshot.write(write)
    forked = os.fork()
    if forked == 0:
        os._exit(0 if (tmp_path / "written").exists() else 1)
    assert os.waitpid(forked, 0)[1] == 0, "forked while a thread was writing"


def test_a_loading_process_does_not_get_the_memory_of_checkpoints() -> None:
    snapshot = Snapshot(64 << 20)
    snapshot.begin()
    copy = snapshot.keep(torch.ones(1000))
    reader, writer = os.pipe()
    if (forked := os.fork()) == 0:
        os.write(writer, str(measure_memory()).encode())
        os._exit(0)
    os.waitpid(forked, 0)
    assert measure_memory() - int(os.read(reader, 100)) > 60 << 20
    assert torch.equal(copy, torch.ones(1000)), "the training still has it"


def test_a_loading_process_keeps_what_it_maps_where_that_memory_lay() -> None:
    """Old snapshots may be garbage when it is forked, and collected there."""

    class Garbage:
        def __init__(self) -> None:
            self.snapshot, self.itself = Snapshot(32 << 20), self
            self.snapshot.begin()

    gc.disable()
    Garbage()
    if (forked := os.fork()) == 0:
        maps = [mmap.mmap(-1, 8 << 20) for _ in range(8)]
        gc.collect()
        for each in maps:
            each.write(b"whole")
        os._exit(0)
    gc.enable()
    assert os.waitpid(forked, 0)[1] == 0


def measure_memory() -> int:
    """Return the bytes of this process's own pages."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) << 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_numbers_of_any_kind_are_kept_also_where_there_is_no_room_for_them(dtype: torch.dtype) -> None:
    tensors = [torch.arange(n, dtype=torch.float32).to(dtype).reshape(-1, 1) for n in (0, 3, 7, 500)]
    snapshot = Snapshot(512)
    snapshot.begin()
    kept = [snapshot.keep(tensor) for tensor in tensors]
    for copy, tensor in zip(kept, tensors, strict=True):
        assert torch.equal(copy, tensor) and copy.dtype == dtype


def test_the_next_save_raises_what_went_wrong_with_the_last(tmp_path: Path) -> None:
    snapshot = Snapshot(64)
    snapshot.begin()
    written = snapshot.write(lambda: (tmp_path / "missing" / "file").touch())
    with pytest.raises(FileNotFoundError):
        snapshot.begin()
    with pytest.raises(FileNotFoundError):
        written.result()


def test_tied_weights_are_copied_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    copied: list[torch.Tensor] = []
    weights = gather_weights(Tied(), None, None, lambda tensor: copied.append(tensor.clone()) or copied[-1])
    assert len(copied) == 1 and weights["embedding.weight"] is weights["head.weight"]
