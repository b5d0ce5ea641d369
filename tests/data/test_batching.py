"""Global batches depend on the seed and the rows alone, and every rank count sees each row exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.batching import FILLER, RankBatches, derive_micro_batch, plan_epoch, share_batch
from job.errors import RecipeError

LENGTHS = st.lists(st.integers(1, 128), min_size=1, max_size=300).map(lambda values: np.array(values, dtype=np.int64))


@given(LENGTHS, st.integers(1, 32), st.integers(0, 3), st.booleans())
def test_an_epoch_has_every_row_once(lengths: np.ndarray, batch: int, epoch: int, by_length: bool) -> None:
    plan = plan_epoch(lengths, batch, seed=7, epoch=epoch, by_length=by_length)
    assert sorted(np.concatenate(plan)) == list(range(len(lengths)))
    assert all(len(part) == batch for part in plan[:-1])


@given(LENGTHS, st.sampled_from([(8, 1), (8, 2), (8, 4), (24, 3)]), st.integers(1, 8))
def test_ranks_together_compute_exactly_the_global_batch(lengths: np.ndarray, size: tuple[int, int], cap: int) -> None:
    shape = derive_micro_batch(*size, cap)
    assert shape.world_size * shape.accumulation * shape.micro_batch == shape.global_batch
    for batch in plan_epoch(lengths, shape.global_batch, 1, 0, True):
        shares = [share_batch(batch, lengths, shape, rank) for rank in range(shape.world_size)]
        assert all([len(micro) for micro in share] == [shape.micro_batch] * shape.accumulation for share in shares)
        rows = [row for share in shares for micro in share for row in micro]
        assert sorted(row for row in rows if row != FILLER) == sorted(batch)


def test_epochs_differ_and_seeds_differ_but_nothing_else_does() -> None:
    lengths = np.arange(1, 101)
    first = np.concatenate(plan_epoch(lengths, 10, 1, 0, True))
    assert np.array_equal(first, np.concatenate(plan_epoch(lengths, 10, 1, 0, True)))
    assert not np.array_equal(first, np.concatenate(plan_epoch(lengths, 10, 1, 1, True)))
    assert not np.array_equal(first, np.concatenate(plan_epoch(lengths, 10, 2, 0, True)))


def test_rows_of_like_length_share_a_batch_and_ranks_get_like_numbers_of_tokens() -> None:
    lengths = np.random.default_rng(0).integers(4, 512, 6400)
    plan = plan_epoch(lengths, 64, 0, 0, True)
    padded = sum(lengths[batch].max() * len(batch) for batch in plan)
    assert padded / lengths.sum() < 1.1
    shape = derive_micro_batch(64, 8, 64)
    for batch in plan[:-1]:
        tokens = [sum(lengths[share_batch(batch, lengths, shape, rank)[0]]) for rank in range(8)]
        assert max(tokens) / np.mean(tokens) < 1.1


def test_the_length_of_the_loader_is_the_number_of_micro_batches() -> None:
    lengths = np.full(100, 5)
    for ranks in (1, 2, 4):
        sampler = RankBatches(lengths, derive_micro_batch(16, ranks, 2), 0, 1, True)
        assert len(sampler) == len(list(sampler))


@pytest.mark.parametrize(("batch", "ranks", "nearest"), [(15, 2, 14), (3, 4, 4), (10, 4, 8), (11, 4, 12), (1, 8, 8)])
def test_a_batch_that_cannot_be_shared_names_the_nearest_that_can(batch: int, ranks: int, nearest: int) -> None:
    with pytest.raises(RecipeError, match=rf"nearest that can is {nearest}$"):
        derive_micro_batch(batch, ranks, 64)


@pytest.mark.parametrize("batch", [64, 128, 512, 2048])
def test_64_ranks_wait_for_the_slowest_less_than_2_percent_of_an_epoch(batch: int) -> None:
    lengths = draw_lengths_like_imdb()
    shape = derive_micro_batch(batch, 64, 64)
    slowest, mean = 0.0, 0.0
    for part in plan_epoch(lengths, batch, 0, 0, True)[:-1]:
        tokens = [
            sum(lengths[row] for micro in share_batch(part, lengths, shape, rank) for row in micro)
            for rank in range(64)
        ]
        slowest, mean = slowest + max(tokens), mean + float(np.mean(tokens))
    assert slowest / mean <= 1.02


def test_hardly_a_token_that_is_computed_is_padding() -> None:
    lengths = draw_lengths_like_imdb()
    shape = derive_micro_batch(8, 1, 64)
    real, computed = 0, 0
    for part in plan_epoch(lengths, 8, 0, 0, True):
        for micro in share_batch(part, lengths, shape, 0):
            rows = lengths[[row for row in micro if row != FILLER]]
            real, computed = real + int(rows.sum()), computed + int(rows.max()) * len(rows)
    assert computed / real <= 1.03, "grouped by length; in random order it is 1.8"


def draw_lengths_like_imdb() -> np.ndarray:
    """Return 25,000 lengths: log-normal, about 260 tokens on average, the longest cut at 512."""
    return np.clip(np.random.default_rng(0).lognormal(np.log(228), 0.62, 25_000), 8, 512).astype(np.int64)
