"""Packing: the rows of a micro-batch end to end in lines of `max_length` tokens, with hardly any padding.

Which rows share a step is not changed by it, nor what the step learns: every row has positions from 0 on, and from
these transformers makes a mask that lets no row see another (`masking_utils.find_packed_sequence_indices`). Whether a
model's code does so is tried out before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from job.data.batching import FILLER
from job.data.tokenize import TokenTable
from job.errors import RecipeError
from job.tasks import IGNORED_LABEL

_TOLERANCE = 1e-3


class PackedCollator:
    """Positions → int64 tensors [lines, longest]: input_ids, position_ids, labels, and `row` [rows]; no mask.

    With a cache transformers would not look for packed rows, so the model is told to do without.
    """

    def __init__(self, table: TokenTable, pad_id: int, max_length: int) -> None:
        self._table, self._pad_id, self._max_length = table, pad_id, max_length

    def __call__(self, positions: list[int]) -> dict[str, Any]:
        chosen = [position for position in positions if position != FILLER]
        lines = pack_lengths(self._table.lengths[chosen], self._max_length) or [[]]
        width = max(sum(int(self._table.lengths[chosen[row]]) for row in line) for line in lines) or 1
        batch = {
            "input_ids": np.full((len(lines), width), self._pad_id, dtype=np.int64),
            "position_ids": np.zeros((len(lines), width), dtype=np.int64),  # each token of padding is a row of its own
            "labels": np.full((len(lines), width), IGNORED_LABEL, dtype=np.int64),
        }
        for number, line in enumerate(lines):
            self._fill({name: array[number] for name, array in batch.items()}, [chosen[row] for row in line])
        batch["row"] = np.array([FILLER if p == FILLER else self._table.rows[p] for p in positions], dtype=np.int64)
        return {name: torch.from_numpy(array) for name, array in batch.items()} | {"use_cache": False}

    def _fill(self, line: dict[str, np.ndarray], positions: list[int]) -> None:
        start = 0
        for position in positions:
            row = slice(self._table.offsets[position], self._table.offsets[position + 1])
            place = slice(start, start + row.stop - row.start)
            line["input_ids"][place] = self._table.tokens[row]
            line["position_ids"][place] = np.arange(row.stop - row.start)
            line["labels"][place] = self._table.labels[row]
            start = place.stop


def pack_lengths(lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[int]]:
    """Return lines of rows, by number, none longer than `max_length` tokens: first fit decreasing (Johnson 1973)."""
    lines: list[list[int]] = []
    room: list[int] = []
    for row in np.argsort(-np.asarray(lengths), kind="stable"):
        length = int(lengths[row])
        fitting = next((line for line, free in enumerate(room) if free >= length), None)
        if fitting is None:
            lines.append([])
            room.append(max(max_length, length))
            fitting = len(lines) - 1
        lines[fitting].append(int(row))
        room[fitting] -= length
    return lines


def check_packing(model: Any, table: TokenTable, pad_id: int) -> None:
    """Raise RecipeError (10) for a model whose answers to a row depend on what is packed beside it, and for ZeRO-3."""
    if is_deepspeed_zero3_enabled():
        raise RecipeError(
            "training.packing: is not offered with ZeRO stage 3; use distributed.zero_stage: 2, or leave it out"
        )
    shortest = np.argsort(table.lengths, kind="stable")[:2]
    together = PackedCollator(table, pad_id, 1 << 30)(shortest.tolist())
    packed = _compute_logits(model, together["input_ids"], together["position_ids"])
    first = int(table.lengths[shortest].max())  # the longer one stands first
    parts = [packed[:, :first], packed[:, first:]]
    alone = [
        _compute_logits(model, together["input_ids"][:, span], together["position_ids"][:, span])
        for span in (slice(None, first), slice(first, None))
    ]
    worst = max(float((one - other).abs().max()) for one, other in zip(parts, alone, strict=True) if one.numel())
    if not worst <= _TOLERANCE:
        raise RecipeError(
            f"training.packing: the rows that are packed together see each other in a {type(model).__name__} (logits "
            f"differ by {worst:.2g}); leave packing out for this model"
        )


@torch.inference_mode()
def _compute_logits(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    training = model.training
    packed = {"input_ids": ids.to(model.device), "position_ids": positions.to(model.device), "use_cache": False}
    logits: torch.Tensor = model.eval()(**packed).logits
    model.train(training)
    return logits.float()
