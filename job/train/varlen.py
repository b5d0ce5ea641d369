"""Attention without padding: a micro-batch's rows end to end in one line, each row attending to itself alone.

transformers 4.57 knows no such thing for BERT, RoBERTa or DistilBERT, but all its models come together in torch's
`scaled_dot_product_attention`. While a micro-batch is computed, that is replaced: on a GPU by
`torch.nn.attention.varlen.varlen_attn`, elsewhere by a loop over the rows. Whether a model takes this is found out by
`attention.py`. Nothing here evaluates: that stays padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional

from job.data.batching import FILLER
from job.data.tokenize import TokenTable
from job.tasks import IGNORED_LABEL, Task
from job.train.methods import Anatomy
from job.train.stream import replace_fillers

_HALF = (torch.bfloat16, torch.float16)
_attend_padded = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Layout:
    """How a model takes rows end to end: whether a token sees those before it alone, and a row's first position."""

    causal: bool
    first_position: int


class FlatCollator:
    """Positions → input_ids and position_ids int64 [1, all tokens], labels of tokens likewise or [rows], and
    `cu_seqlens` int32 [rows + 1], where rows begin and end. FILLER becomes a row that adds nothing to the loss.
    """

    def __init__(self, table: TokenTable, first_position: int, with_types: bool) -> None:
        self._table, self._first_position, self._with_types = table, first_position, with_types

    def __call__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        table = self._table
        chosen, filler = replace_fillers(positions, table)
        spans = [slice(table.offsets[position], table.offsets[position + 1]) for position in chosen]
        lengths = [span.stop - span.start for span in spans]
        batch = {
            "input_ids": np.concatenate([table.tokens[span] for span in spans]).astype(np.int64)[None],
            "position_ids": np.concatenate([np.arange(length) for length in lengths])[None] + self._first_position,
            "cu_seqlens": np.cumsum([0, *lengths], dtype=np.int32),
            "row": np.where(filler, FILLER, table.rows[chosen]),
        }
        if self._with_types:  # also where there are none: models have a buffer of zeros that is too short
            batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
            if table.types is not None:
                np.concatenate([table.types[span] for span in spans], out=batch["token_type_ids"][0], casting="safe")
        if table.per_token:
            batch["labels"] = np.concatenate([table.labels[span] for span in spans]).astype(np.int64)[None]
            batch["labels"][0, np.repeat(filler, lengths)] = IGNORED_LABEL
        else:
            batch["labels"] = np.array(table.labels[chosen])
            batch["labels"][filler] = IGNORED_LABEL
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}

    def find_row(self, batch: dict[str, torch.Tensor], line: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of a row's ids and labels in a batch whose tokens have labels."""
        begin, end = batch["cu_seqlens"][line : line + 2].tolist()
        return batch["input_ids"][0, begin:end], batch["labels"][0, begin:end]


class FlatRows:
    """Lets a model compute rows that lie end to end; outside of `apart` the model is what it was.

    `dropout`: the largest share of attention weights that the model has asked to drop; nothing is dropped. `calls`:
    how often it has asked for attention within `apart`.
    """

    def __init__(self, model: Any, task: Task) -> None:
        self.layout, self.dropout, self.calls = Layout(causal=False, first_position=0), 0.0, 0
        self._parameters = inspect.signature(model.forward).parameters
        self.with_types = "token_type_ids" in self._parameters
        self._bounds: list[int] = []
        self._cu_seqlens = self._positions = torch.empty(0)
        self._longest = 0
        self._hooks: list[Any] = []
        if not task.per_token:
            last = Anatomy.of(model).layers[-1:]
            self._hooks += [model.get_submodule(name).register_forward_hook(self._keep_first_tokens) for name in last]
        if "position_ids" not in self._parameters:  # DistilBERT's would be 0, 1, 2, … in transformers 4.57
            embeddings = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
            self._hooks += [module.register_forward_pre_hook(self._replace_positions) for module in embeddings]

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()

    def collate(self, table: TokenTable) -> FlatCollator:
        """Return what makes batches of a table's rows."""
        return FlatCollator(table, self.layout.first_position, self.with_types)

    def measure_longest(self, batch: dict[str, Any]) -> int:
        """Return the tokens of the longest row of a batch."""
        return int(batch["cu_seqlens"].diff().max())

    @contextmanager
    def apart(self, batch: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
        """Yield the keyword arguments for the model; it must be called, forward and backward, within."""
        kept, self._longest, self.calls = dict(batch), self.measure_longest(batch), 0
        cu_seqlens = kept.pop("cu_seqlens")
        self._bounds = cu_seqlens.tolist()
        self._cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        if "position_ids" not in self._parameters:
            self._positions = kept.pop("position_ids").to(device, non_blocking=True)
        if self.layout.causal:  # a mask of four dimensions is left alone; without, one of tokens × tokens is made
            kept["attention_mask"] = torch.zeros(1, 1, 1, 1, device=device)
        if "use_cache" in self._parameters:
            kept["use_cache"] = False
        torch.nn.functional.scaled_dot_product_attention = self._attend
        try:
            yield kept
        finally:
            torch.nn.functional.scaled_dot_product_attention = _attend_padded
            self._bounds = []

    def _keep_first_tokens(self, layer: Any, args: Any, output: Any) -> Any:
        """Behind the last layer every token is computed alone, and the head asks for the first of each row."""
        if not self._bounds:
            return output
        starts = self._cu_seqlens[:-1]
        if torch.is_tensor(output):
            return output[0].index_select(0, starts)[:, None]
        return tuple(part[0].index_select(0, starts)[:, None] if torch.is_tensor(part) else part for part in output)

    def _replace_positions(self, embedding: Any, args: Any) -> Any:
        return (self._positions,) if self._bounds else args

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """As torch's function: query, key, value [1, heads, tokens, width] → [1, heads, tokens, width]."""
        if query.shape[0] != 1 or query.shape[2] != self._bounds[-1]:
            raise ValueError(f"attention of {tuple(query.shape)} while {self._bounds[-1]} tokens are computed")
        self.dropout, self.calls = max(self.dropout, dropout_p), self.calls + 1
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        device = query.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        if device == "cuda" and dtype in _HALF:
            return self._run_kernel(query.to(dtype), key.to(dtype), value.to(dtype), scale)
        rows = [slice(*span) for span in zip(self._bounds, self._bounds[1:], strict=False)]
        parts = [
            _attend_padded(
                *(each[:, :, row] for each in (query, key, value)), is_causal=self.layout.causal, scale=scale
            )
            for row in rows
        ]
        return torch.cat(parts, dim=2)

    def _run_kernel(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        flat = [each[0].transpose(0, 1) for each in (query, key, value)]
        bounds, longest = self._cu_seqlens, self._longest
        window = (-1, 0) if self.layout.causal else (-1, -1)
        out = varlen_attn(*flat, bounds, bounds, longest, longest, scale=scale, window_size=window)
        return out.transpose(0, 1)[None]
