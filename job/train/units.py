"""Numbers are trained in standard deviations from their mean (`job/tasks/units.py`); the stage `merge` takes that back.

Checkpoints hold the model as it is trained, so that an attempt goes on from the same bits; what is evaluated, exported
and released answers in the data's own units.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from job.data.tokenize import TokenTable
from job.recipe import Run
from job.tasks import Units, find_head
from job.train.trainer import TrainingData

log = logging.getLogger("job.train")


def enter_units(model: Any, new_weights: list[str], data: TrainingData) -> TrainingData:
    """Return the tables with their labels in the units of the train labels; a head that is not new answers in them."""
    name, head = find_head(model)
    units = Units.measure(data.train.labels, head)
    if head is not None and f"{name}.weight" not in new_weights:
        with _gather(head):
            units.enter(head)
    if head is not None and head.bias is None and abs(float(np.mean(data.train.labels))) > units.deviation / 2:
        log.warning("%s has no bias, so labels far from 0 are learned slowly; subtract their mean", name)
    return replace(data, train=_standardize(data.train, units), validation=_standardize(data.validation, units))


def restore_units(model: Any, run: Run, answers: np.ndarray) -> np.ndarray:
    """Let a trained model answer in the data's units; return `answers` float [rows, k], which it gave, in them."""
    _, head = find_head(model)
    units = Units.measure(TokenTable.open(run.tokens("train")).labels, head)
    units.leave(head)
    log.info("the model answers in the data's units: mean %.6g, standard deviation %.6g", *units)
    return np.column_stack([answers[:, 0].astype(np.float64) * units.deviation + units.mean, answers[:, 1:]])


def _standardize(table: TokenTable, units: Units) -> TokenTable:
    return replace(table, labels=units.standardize(table.labels))


def _gather(head: torch.nn.Linear) -> Any:
    """Return a context in which the head's weights are whole: ZeRO-3 has sharded them."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(list(head.parameters()), modifier_rank=0)
