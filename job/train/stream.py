"""The stream of rows: what is drawn for a micro-batch depends on the seed and its place alone.

A data set or collator may draw random numbers (masking, augmentation). Each micro-batch is fetched
under generators seeded for it, and the state before is put back, so that neither the number of
loading processes, nor prefetching, nor a resumed attempt can change a bit. `SampleDigest` proves it.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from job.data.batching import FILLER, MicroBatch, RankBatches
from job.data.tokenize import AS_LONGEST, TokenTable, Widths
from job.tasks import IGNORED_LABEL

_MODULUS = 1 << 256
_LIMBS, _LIMB_BITS = 16, 16

Redraw = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


@contextmanager
def keep_generators() -> Iterator[None]:
    """Put the generators of Python, numpy, torch and this CUDA device back to what they were before."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if device is not None:
            torch.cuda.set_rng_state(device)


def seed_generators(*path: int) -> None:
    """Seed Python, numpy and torch's CPU generator from whole numbers; CUDA's stay as they are."""
    words = np.random.SeedSequence(path).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]) << 32 | int(words[3]))


def seed_rank(*path: int) -> None:
    """Seed all generators that a rank's own computation (dropout) draws from, CUDA's too."""
    seed_generators(*path)
    torch.cuda.manual_seed(int(np.random.SeedSequence(path).generate_state(1)[0]))


class Collator:
    """Positions → int64 tensors [rows, width]; FILLER becomes a row that adds nothing to the loss."""

    def __init__(self, table: TokenTable, pad_id: int, with_rows: bool, widths: Widths = AS_LONGEST) -> None:
        self._table, self._pad_id, self._with_rows, self._widths = table, pad_id, with_rows, widths

    def __call__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        chosen, filler = replace_fillers(positions, self._table)
        batch = self._table.pad(chosen, self._pad_id, self._widths)
        batch["labels"] = self._table.pad_labels(chosen, self._widths)
        batch["labels"][filler] = IGNORED_LABEL
        if self._with_rows:
            batch["row"] = np.where(filler, FILLER, self._table.rows[chosen])
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}

    def find_row(self, batch: dict[str, torch.Tensor], line: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of a row's ids and labels, without padding, in a batch whose tokens have labels."""
        length = int(batch["attention_mask"][line].sum())
        return batch["input_ids"][line, :length], batch["labels"][line, :length]


def replace_fillers(positions: list[int], table: TokenTable) -> tuple[np.ndarray, np.ndarray]:
    """Return positions int64 with the shortest row for each FILLER, and bool: which those are; both [rows]."""
    chosen = np.asarray(positions, dtype=np.int64)
    filler = chosen == FILLER
    return np.where(filler, int(np.argmin(table.lengths)) if filler.any() else 0, chosen), filler


class TableRows(Dataset[int]):
    """Positions of a token table; the collator looks the rows up, so that a batch is padded in one go."""

    def __init__(self, order: np.ndarray) -> None:
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> int:
        return FILLER if index == FILLER else int(self._order[index])


class SeededBatches(Dataset[Any]):
    """Fetches and collates a whole MicroBatch under generators of its own.

    `redraw` makes of a row's ids and labels those of an epoch, by a generator that depends on seed, epoch and row
    alone: whatever the number of ranks, an epoch has the same rows.
    """

    def __init__(self, rows: Dataset[int], collate: Any, seed: int, redraw: Redraw | None = None) -> None:
        self._rows, self._collate, self._seed, self._redraw = rows, collate, seed, redraw

    def __len__(self) -> int:
        return len(self._rows)  # every data set here has a length

    def __getitems__(self, micro: MicroBatch) -> Any:
        """Return the collated micro-batch; torch's fetcher calls this instead of `__getitem__`."""
        with keep_generators():
            seed_generators(self._seed, micro.epoch, micro.number)
            batch = self._collate([self._rows[position] for position in micro.positions])
        for line, position in enumerate(micro.positions if self._redraw else ()):
            if self._redraw and position != FILLER:
                ids, labels = self._collate.find_row(batch, line)
                rng = np.random.default_rng([self._seed, micro.epoch, position])
                drawn = self._redraw(ids.numpy(), labels.numpy(), rng)
                ids.copy_(torch.from_numpy(drawn[0])), labels.copy_(torch.from_numpy(drawn[1]))
        return batch


class EpochLoader(DataLoader[Any]):
    """A DataLoader whose batch sampler is told the epoch, as Trainer's loop expects."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler."""
        self.batch_sampler.set_epoch(epoch)


def load_batches(data: Dataset[Any], sampler: RankBatches, workers: int, pin_memory: bool) -> EpochLoader:
    """Return the loader of one rank's micro-batches; its processes pass stop signals on to this one."""
    return EpochLoader(
        data,
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,  # forked once, not in every epoch
        pin_memory=pin_memory,
        worker_init_fn=pass_signals_on,
        generator=torch.Generator(),  # else a new iterator draws its seed from the global one
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def pass_signals_on(worker: int) -> None:
    """Let a loading process pass a stop signal on to its rank; the rank itself may end it with SIGTERM."""
    numbers = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    rank = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def wait() -> None:
        while True:
            heard = signal.sigwaitinfo(numbers)
            if heard.si_signo == signal.SIGTERM and heard.si_pid == rank:  # torch ends its loading processes so
                os._exit(0)
            os.kill(rank, heard.si_signo)

    threading.Thread(target=wait, name="signals", daemon=True).start()


class SampleDigest:
    """The sum of sha256("step:row") over all rows that were computed, modulo 2²⁵⁶.

    It does not depend on the order inside a batch, nor on how ranks share it: the sum of all
    ranks' digests is that of the same training on one rank.
    """

    def __init__(self) -> None:
        self.total, self.count = 0, 0

    def add(self, step: int, rows: Iterable[int]) -> None:
        """Count the rows that this rank computes at a global step; FILLER does not count."""
        for row in rows:
            if row != FILLER:
                self.total += int.from_bytes(hashlib.sha256(b"%d:%d" % (step, row)).digest(), "big")
                self.count += 1
        self.total %= _MODULUS

    def to_json(self) -> dict[str, Any]:
        """Return what `merge` reads."""
        return {"sum": f"{self.total:064x}", "count": self.count}

    def merge(self, saved: dict[str, Any]) -> None:
        """Add what a rank saved."""
        self.total = (self.total + int(saved["sum"], 16)) % _MODULUS
        self.count += int(saved["count"])

    def sum_over_ranks(self, group: Any) -> tuple[str, int]:
        """Return (digest as hex, rows) over all ranks; every rank must call. `group` is a CPU group, None for one rank.

        The sum travels as int64 limbs of 16 bits, so that nothing is pickled.
        """
        limbs = [self.total >> _LIMB_BITS * place & (1 << _LIMB_BITS) - 1 for place in range(_LIMBS)]
        numbers = torch.tensor([*limbs, self.count], dtype=torch.int64)
        if group is not None:
            torch.distributed.all_reduce(numbers, group=group)
        *limbs, count = numbers.tolist()
        total = sum(limb << _LIMB_BITS * place for place, limb in enumerate(limbs)) % _MODULUS
        return f"{total:064x}", count
