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

import job.train.snapshot
from job.store.held import HeldFile
from job.train.checkpoint import gather_weights
from job.train.shards import hold_shard
from job.train.snapshot import Snapshot


def test_what_is_written_is_the_state_at_the_save_and_not_that_of_later_steps(tmp_path: Path) -> None:
    weights, go_on = torch.arange(10.0), Event()
    snapshot = Snapshot(1024)
    snapshot.begin()
    kept = {"weights": snapshot.keep(weights)}

    def write() -> list[HeldFile]:
        go_on.wait(60)
        save_file(kept, tmp_path / "kept.safetensors")
        return []

    written = snapshot.write(write)
    weights += 1  # a step, while nothing is written yet
    assert not written.done()
    go_on.set()
    assert written.result(60).seconds >= 0
    assert torch.equal(load_file(tmp_path / "kept.safetensors")["weights"], torch.arange(10.0))


def test_every_save_has_the_same_memory_and_waits_until_the_one_before_is_written() -> None:
    snapshot, go_on, places = Snapshot(1024), Event(), []
    snapshot.begin()
    places.append(snapshot.keep(torch.ones(8)).data_ptr())
    snapshot.write(lambda: [][: go_on.wait(60)])
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

    def write() -> list[HeldFile]:
        time.sleep(0.7)
        (tmp_path / "written").touch()
        return []

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
    """Return the bytes of this process's own pages; `status` is off by more the more processors there are."""
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(lines["Anonymous"].split()[0]) << 10


@pytest.fixture
def snapshot() -> Snapshot:
    """One that has begun."""
    found = Snapshot(1 << 20)
    found.begin()
    return found


def hold_state(snapshot: Snapshot, folder: Path) -> HeldFile:
    """Return the file of a checkpoint in memory, which nobody uploads."""
    kept = snapshot.keep(torch.arange(1000.0))
    (file,) = snapshot.write(lambda: [hold_shard({"weight|exp_avg|0": kept}, folder, 0)]).result(60).held
    return file


def test_the_optimizer_s_state_needs_no_room_on_disk_while_the_store_answers(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    for _ in range(3):
        file = hold_state(snapshot, tmp_path)
        assert not list(tmp_path.iterdir()), "it is read from memory"
        assert file.read(0, file.size)[-4:] == torch.tensor(999.0).numpy().tobytes()
        file.drop()  # it has been uploaded
        snapshot.begin()
    assert not list(tmp_path.iterdir())


def test_the_next_save_leaves_what_was_not_sent_yet_on_disk(snapshot: Snapshot, tmp_path: Path) -> None:
    file = hold_state(snapshot, tmp_path)
    whole = file.read(0, file.size)
    snapshot.begin()
    snapshot.keep(torch.zeros(1000))
    assert load_file(file.path)["weight|exp_avg|0"].equal(torch.arange(1000.0))
    assert file.read(0, file.size) == whole, "who is uploading it goes on with the file"


def test_what_is_not_sent_for_long_goes_to_disk_so_that_no_save_waits_for_that(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.train.snapshot, "_LEAST_PATIENCE_S", 0.05)
    file = hold_state(snapshot, tmp_path)
    assert file.is_free.wait(60)
    assert load_file(file.path)["weight|exp_avg|0"].equal(torch.arange(1000.0))


def test_without_room_on_disk_it_stays_in_memory_and_only_a_save_that_needs_that_memory_fails(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(job.train.snapshot, "_LEAST_PATIENCE_S", 0.05)
    file = hold_state(snapshot, tmp_path / "no such folder")
    whole = file.read(0, file.size)
    deadline = time.monotonic() + 60
    while "stays in memory" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "stays in memory" in caplog.text
    assert file.read(0, file.size) == whole and not file.is_free.is_set()
    with pytest.raises(FileNotFoundError):
        snapshot.begin()


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
    written = snapshot.write(lambda: (tmp_path / "missing" / "file").touch() or [])
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
