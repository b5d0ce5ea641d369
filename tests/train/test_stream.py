"""What is drawn for a micro-batch depends on the seed and its place alone; the digest on the rows and steps alone."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import given
from hypothesis import strategies as st

from job.data.batching import FILLER, RankBatches, derive_micro_batch
from job.train.checkpoint import read_random_state, read_samples, write_random_state
from job.train.stream import (
    EpochLoader,
    SampleDigest,
    SeededBatches,
    TableRows,
    keep_generators,
    load_batches,
    seed_generators,
    seed_rank,
)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def collate(positions: list[int]) -> dict[str, Any]:
    return {"positions": positions, "drawn": draw()}


def make_loader(workers: int, rank: int = 0) -> EpochLoader:
    sampler = RankBatches(np.arange(1, 51), derive_micro_batch(8, 2, 2), rank, 3, True)
    return load_batches(SeededBatches(TableRows(np.arange(50)), collate, 3), sampler, workers, False)


def test_a_loader_gives_the_same_batches_with_any_workers_and_from_any_batch_on() -> None:
    seed_generators(1)
    before = draw()
    seed_generators(1)
    loader = make_loader(0)
    loader.set_epoch(1)
    expected = list(loader)
    assert draw() == before, "loading left a trace in the generators"
    for workers in (0, 2):
        again = make_loader(workers)
        again.set_epoch(1)
        assert list(again) == expected
        assert list(skip_first_batches(again, 5)) == expected[5:]
    other = make_loader(0, rank=1)
    other.set_epoch(1)
    assert not {batch["drawn"] for batch in other} & {batch["drawn"] for batch in expected}
    loader.set_epoch(2)
    assert not {batch["drawn"] for batch in loader} & {batch["drawn"] for batch in expected}


def test_loading_processes_are_forked_once_and_give_the_batches_of_every_epoch() -> None:
    alone, loader, processes = make_loader(0), make_loader(2), []
    for epoch in (1, 2, 3):
        alone.set_epoch(epoch)
        loader.set_epoch(epoch)
        assert list(loader) == list(alone)
        processes.append([worker.pid for worker in loader._iterator._workers])  # type: ignore[union-attr]
    assert processes == [processes[0]] * 3


def test_generators_are_put_back_even_after_an_error() -> None:
    seed_generators(2)
    expected = draw()
    seed_generators(2)
    with pytest.raises(ValueError, match="inside"), keep_generators():
        draw()
        raise ValueError("inside")
    assert draw() == expected


def test_a_rank_goes_on_from_its_own_state_and_a_new_rank_from_the_seed(tmp_path: Path) -> None:
    seed_rank(4, 0, 0)
    write_random_state(0, SampleDigest(), tmp_path)
    expected = draw()
    seed_generators(9)
    read_random_state(0, (4, 0, 7), tmp_path)
    assert draw() == expected
    read_random_state(1, (4, 1, 7), tmp_path)
    assert draw() != expected
    read_random_state(1, (4, 1, 7), tmp_path)
    fresh = draw()
    seed_rank(4, 1, 7)
    assert draw() == fresh


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 1000), st.integers(0, 3)), max_size=60))
def test_the_digest_does_not_depend_on_who_computes_a_row(rows: list[tuple[int, int, int]]) -> None:
    together, apart = SampleDigest(), [SampleDigest() for _ in range(4)]
    for step, row, rank in rows:
        together.add(step, [row, FILLER])
        apart[rank].add(step, [row])
    merged = SampleDigest()
    for digest in reversed(apart):
        merged.merge(digest.to_json())
    assert merged.to_json() == together.to_json()
    assert together.sum_over_ranks(None) == (together.to_json()["sum"], len(rows))


def test_the_digest_sees_a_row_that_is_lost_repeated_or_moved_to_another_step() -> None:
    def digest(*rows: tuple[int, int]) -> int:
        found = SampleDigest()
        for step, row in rows:
            found.add(step, [row])
        return found.total

    straight = digest((0, 1), (0, 2), (1, 3))
    assert digest((1, 3), (0, 2), (0, 1)) == straight
    assert straight not in (
        digest((0, 1), (0, 2)),
        digest((0, 1), (0, 2), (1, 3), (1, 3)),
        digest((0, 1), (1, 2), (1, 3)),
    )


def test_rank_0_goes_on_with_the_sum_of_all_that_was_saved(tmp_path: Path) -> None:
    total = SampleDigest()
    for rank in range(3):
        digest = SampleDigest()
        digest.add(rank, [rank, rank + 1])
        total.merge(digest.to_json())
        write_random_state(rank, digest, tmp_path)
    assert read_samples(0, tmp_path).to_json() == total.to_json()
    assert read_samples(1, tmp_path).to_json() == SampleDigest().to_json()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_loading_process_passes_a_signal_on_and_lives(number: signal.Signals) -> None:
    heard: list[int] = []
    before = signal.signal(number, lambda got, frame: heard.append(got))
    try:
        batches = iter(make_loader(1))
        next(batches)
        worker = batches._workers[0]  # type: ignore[attr-defined]
        # from a third process: SIGTERM from the rank itself is how torch ends its loading processes
        os.system(f"kill -{int(number)} {worker.pid}")
        deadline = time.monotonic() + 60
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
        assert heard == [number]
        assert worker.is_alive()
        assert len(list(batches)) == 13
    finally:
        signal.signal(number, before)
