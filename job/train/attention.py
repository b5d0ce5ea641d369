"""Whether a training computes its rows without padding (`varlen.py`), and how the model must then be asked.

A model's code says neither where it counts positions from nor whether a token sees the ones behind it, so the
longest row and short ones are asked about padded and end to end: the layout by which both answers are the same is
taken. A model that looks elsewhere than torch's attention function, or through a window, has none.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from job.data.tokenize import TokenTable
from job.errors import RecipeError
from job.tasks import Task, join_outputs
from job.train.stream import Collator, keep_generators
from job.train.varlen import FlatRows, Layout

log = logging.getLogger("job.train")

_TOLERANCE = 1e-3
"""Share of the largest logit by which fp32 answers may differ; a row that sees another differs by a tenth or more."""


def choose_attention(asked: str, precision: str, model: Any, task: Task, table: TokenTable) -> FlatRows | None:
    """Return how rows are computed end to end, None where they are padded.

    `asked`: training.attention. `auto` wants it where a GPU has a kernel for it and the model loses nothing by it,
    `varlen` everywhere; that raises RecipeError (10) where task or model cannot.
    """
    if asked == "padded" or (asked == "auto" and not has_kernel(precision)):
        return None
    try:
        _check_task(task)
        rows = find_layout(model, task, table, precision)
    except RecipeError as error:
        if asked == "varlen":
            raise
        log.info("%s", error)
        return None
    if not rows.dropout:
        return rows
    if asked == "auto":
        log.info(
            "training.attention: auto pads: this model drops %g of its attention weights in training, for which there "
            "is no kernel; with attention: varlen it drops none", rows.dropout,
        )  # fmt: skip
        rows.remove()
        return None
    log.info("training.attention: varlen drops no attention weights; padded would drop %g", rows.dropout)
    return rows


def has_kernel(precision: str) -> bool:
    """Tell whether this rank's GPU has a kernel for rows of any length: FlashAttention 2, for Ampere or newer."""
    return precision in ("bf16", "fp16") and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _check_task(task: Task) -> None:
    if task.is_encoder_decoder or task.per_window:
        raise RecipeError(f"training.attention: varlen is not offered for {task.name}; use auto or padded")
    if is_deepspeed_zero3_enabled():
        raise RecipeError(
            "training.attention: varlen is not offered with ZeRO stage 3; use distributed.zero_stage: 2, or auto"
        )


def find_layout(model: Any, task: Task, table: TokenTable, precision: str) -> FlatRows:
    """Return a model's way to take rows end to end; raise RecipeError (10) where it has none, or a kernel refuses it.

    RoBERTa counts positions from behind the padding's id on (fairseq).
    """
    pad_id = int(model.config.pad_token_id or 0)
    order = np.argsort(table.lengths, kind="stable")
    few = sorted({int(order[-1]), *order[:2].tolist()})
    training, rows = model.training, FlatRows(model, task, int(table.lengths.max()))
    try:
        padded = _answer_padded(model.eval(), task, table, pad_id, few)
        for rows.layout in (Layout(False, 0), Layout(True, 0), Layout(False, pad_id + 1)):
            flat = _answer_flat(model, task, rows, table, few)
            if flat is not None and float((padded - flat).abs().max()) <= _TOLERANCE * float(padded.abs().max()):
                rows.dropout = 0.0
                with keep_generators(), _compute_half(precision):
                    kernel = _answer_flat(model.train(), task, rows, table, few)
                if kernel is not None:  # widths of heads, say
                    return rows
    finally:
        model.train(training)
    rows.remove()
    raise RecipeError(
        f"training.attention: a {type(model).__name__} answers otherwise to rows that lie end to end than to padded "
        "ones, so it cannot be trained by varlen; use auto or padded"
    )


def _compute_half(precision: str) -> Any:
    """Return the context in which a GPU's kernel is called, one that changes nothing where there is none."""
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast("cuda", half) if has_kernel(precision) else nullcontext()


@torch.no_grad()
def _answer_padded(model: Any, task: Task, table: TokenTable, pad_id: int, few: list[int]) -> torch.Tensor:
    batch = Collator(table, pad_id, with_rows=False)(few)
    del batch["labels"]
    logits = _call(model, task, batch)
    return logits[batch["attention_mask"].bool().to(logits.device)] if task.per_token else logits


@torch.no_grad()
def _answer_flat(model: Any, task: Task, rows: FlatRows, table: TokenTable, few: list[int]) -> torch.Tensor | None:
    """Return logits as of `_answer_padded`, None where the model cannot compute them."""
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30  # on a GPU, going beyond ends the process
    if rows.layout.first_position + int(table.lengths[few].max()) > limit:
        return None
    batch = rows.collate(table)(few)
    del batch["labels"], batch["row"]
    try:
        with rows.apart(batch, model.device) as kept:
            logits = _call(model, task, kept)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):  # the code of 400 kinds of models
        return None
    count = int(table.lengths[few].sum()) if task.per_token else len(few)
    whole = logits[0] if task.per_token else logits
    return whole if len(whole) == count and rows.calls else None


def _call(model: Any, task: Task, batch: dict[str, Any]) -> torch.Tensor:
    moved = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    logits: torch.Tensor = join_outputs(task, model(**moved))
    return logits.float()
