"""Dealing rows to ranks: the same global batches in the same order, however many ranks share them.

An epoch is a shuffled list of global batches that depends on seed and epoch only. Each global
batch is dealt to ranks, and each rank's share is cut into micro-batches of like length. Where the
last batch does not come out even, filler rows (position −1) that add nothing to the loss fill it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from job.errors import RecipeError

FILLER = -1
_GROUPED_BATCHES = 50
"""Rows are sorted by length within so many global batches: enough to group, few enough to stay random."""


@dataclass(frozen=True)
class BatchShape:
    """How one global batch is shared: rows = world_size × accumulation × micro_batch."""

    global_batch: int
    world_size: int
    micro_batch: int
    accumulation: int


def derive_micro_batch(global_batch: int, world_size: int, max_micro_batch: int) -> BatchShape:
    """Share a global batch among ranks; raise RecipeError (10) naming the nearest batch that can be shared."""
    share, rest = divmod(global_batch, world_size)
    if rest or share == 0:
        lower = max(share, 1) * world_size
        upper = lower if lower > global_batch else lower + world_size
        nearest = lower if global_batch - lower <= upper - global_batch else upper
        raise RecipeError(
            f"training.global_batch_size: {global_batch} rows cannot be shared by {world_size} ranks; "
            f"the nearest that can is {nearest}"
        )
    accumulation = next(n for n in range(math.ceil(share / max_micro_batch), share + 1) if share % n == 0)
    return BatchShape(global_batch, world_size, share // accumulation, accumulation)


def plan_epoch(lengths: np.ndarray, global_batch: int, seed: int, epoch: int, by_length: bool) -> list[np.ndarray]:
    """Return the epoch's global batches as int64 arrays of row positions; the last may be short.

    `lengths` is int64 [rows], tokens per row. `by_length` lets rows of like length share a batch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if not by_length:
        return [order[start : start + global_batch] for start in range(0, len(order), global_batch)]
    pool = _GROUPED_BATCHES * global_batch
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[first : first + global_batch] for first in range(0, len(part), global_batch)]
    short = [batch for batch in batches if len(batch) < global_batch]
    full = [batch for batch in batches if len(batch) == global_batch]
    rng.shuffle(full)
    return full + short


def share_batch(batch: np.ndarray, lengths: np.ndarray, shape: BatchShape, rank: int) -> list[list[int]]:
    """Return this rank's micro-batches of one global batch, as positions; FILLER fills a short batch.

    Rows go to ranks in turn by length, so every rank gets about the same number of tokens.
    """
    ordered = batch[np.argsort(-lengths[batch], kind="stable")]
    filled = np.full(shape.global_batch, FILLER, dtype=np.int64)
    filled[: len(ordered)] = ordered
    mine = filled[rank :: shape.world_size]
    return [mine[start : start + shape.micro_batch].tolist() for start in range(0, len(mine), shape.micro_batch)]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass: `number` counts all ranks' micro-batches of the epoch, in order of the batches."""

    epoch: int
    number: int
    positions: list[int]

    def __len__(self) -> int:
        return len(self.positions)


class RankBatches:
    """Batch sampler of one rank: yields the micro-batches of the epoch that was set."""

    def __init__(self, lengths: np.ndarray, shape: BatchShape, rank: int, seed: int, by_length: bool) -> None:
        self._lengths, self._shape, self._rank = lengths, shape, rank
        self._seed, self._by_length = seed, by_length
        self._epoch = 0
        self.batch_size = shape.micro_batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0-based) whose batches come next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self._lengths) / self._shape.global_batch) * self._shape.accumulation

    def __iter__(self) -> Iterator[MicroBatch]:
        shape = self._shape
        plan = plan_epoch(self._lengths, shape.global_batch, self._seed, self._epoch, self._by_length)
        for index, batch in enumerate(plan):
            for part, positions in enumerate(share_batch(batch, self._lengths, shape, self._rank)):
                number = (index * shape.world_size + self._rank) * shape.accumulation + part
                yield MicroBatch(self._epoch, number, positions)
