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


@dataclass
class Line:
    """A micro-batch that is computed end to end: where rows begin and end, int32 [rows + 1]; where each token stands in
    its row, int64 [1, tokens]; the rows' lengths; the most tokens that a row of any micro-batch has; whether a token
    sees those before it alone.
    """

    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]
    limit: int
    causal: bool


_line: Line | None = None
"""Global, as the function is that reads it. torch.compile takes numbers in a list, and tensors that hang at a module's
hook, for constant, and would compile the model for each micro-batch anew."""


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
    """Lets a model compute rows that lie end to end; outside of `apart` the model is what it was. It has one at a time.

    `limit`: the most tokens that a row has. `dropout`: the largest share of attention weights that the model has asked
    to drop; nothing is dropped. `calls`: how often it has asked for attention within `apart`.
    """

    def __init__(self, model: Any, task: Task, limit: int) -> None:
        self._limit = limit
        self.layout, self.dropout, self.calls = Layout(causal=False, first_position=0), 0.0, 0
        self._parameters = inspect.signature(model.forward).parameters
        self.with_types = "token_type_ids" in self._parameters
        self._hooks: list[Any] = []
        if not task.per_token:
            last = Anatomy.of(model).layers[-1:]
            self._hooks += [model.get_submodule(name).register_forward_hook(_keep_first_tokens) for name in last]
        if "position_ids" not in self._parameters:  # DistilBERT's would be 0, 1, 2, … in transformers 4.57
            embeddings = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
            self._hooks += [module.register_forward_pre_hook(_replace_positions) for module in embeddings]

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
        global _line
        kept, self.calls = dict(batch), 0
        bounds, positions = kept.pop("cu_seqlens"), kept.pop("position_ids").to(device, non_blocking=True)
        if "position_ids" in self._parameters:
            kept["position_ids"] = positions
        if self.layout.causal:  # a mask of four dimensions is left alone; without, one of tokens × tokens is made
            kept["attention_mask"] = torch.zeros(1, 1, 1, 1, device=device)
        if "use_cache" in self._parameters:
            kept["use_cache"] = False
        lengths, bounds = bounds.diff().tolist(), bounds.to(device, non_blocking=True)
        _line = Line(bounds, positions, lengths, self._limit, self.layout.causal)
        torch.nn.functional.scaled_dot_product_attention = self._attend
        try:
            yield kept
        finally:
            torch.nn.functional.scaled_dot_product_attention = _attend_padded
            _line = None

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
        if _line is None or query.shape[0] != 1 or query.shape[2] != _line.positions.shape[1]:
            raise ValueError(f"attention of {tuple(query.shape)}, which are not the rows that lie end to end")
        self.dropout, self.calls = max(self.dropout, dropout_p), self.calls + 1
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        device = query.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
        if device == "cuda" and dtype in _HALF:
            return _run_kernel(_line, [query.to(dtype), key.to(dtype), value.to(dtype)], scale)
        return _attend_by_row(_line, [query, key, value], scale)


def _run_kernel(line: Line, states: list[torch.Tensor], scale: float | None) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    flat = [each[0].transpose(0, 1) for each in states]
    window = (-1, 0) if line.causal else (-1, -1)
    bounds = line.cu_seqlens
    longest = line.limit if torch.compiler.is_compiling() else max(line.lengths)  # what is compiled is for all batches
    out = varlen_attn(*flat, bounds, bounds, longest, longest, scale=scale, window_size=window)
    return out.transpose(0, 1)[None]


@torch.compiler.disable  # a compiled loop over the rows would hold for rows of these lengths alone
def _attend_by_row(line: Line, states: list[torch.Tensor], scale: float | None) -> torch.Tensor:
    rows = zip(*(each.split(line.lengths, dim=2) for each in states), strict=True)
    return torch.cat([_attend_padded(*row, is_causal=line.causal, scale=scale) for row in rows], dim=2)


def _keep_first_tokens(layer: Any, args: Any, output: Any) -> Any:
    """Behind the last layer every token is computed alone, and the head asks for the first of each row."""
    if _line is None:
        return output
    starts = _line.cu_seqlens[:-1]
    if torch.is_tensor(output):
        return output[0].index_select(0, starts)[:, None]
    return tuple(part[0].index_select(0, starts)[:, None] if torch.is_tensor(part) else part for part in output)


def _replace_positions(embedding: Any, args: Any) -> Any:
    return args if _line is None else (_line.positions,)
