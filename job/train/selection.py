"""Which model is taken, and when training ends because it gets no better: both by the task's metric on validation rows.

Both follow from the log of evaluations alone, which every checkpoint carries, so that a resumed training decides as
one that nothing interrupted. So do the weights of the best so far: they are a file of every later checkpoint.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.recipe.schema import Training
from job.train.checkpoint import BEST_FILE, write_weights
from job.train.fragments import WEIGHTS_FILE

log = logging.getLogger("job.train")


@dataclass(frozen=True)
class Standing:
    """`step` and `value` of the best evaluation, None before the first; `waited`: evaluations since the last gain."""

    step: int | None
    value: float | None
    waited: int


class EndedEarly(Exception):
    """The checkpoint that training would go on from is one after which it had ended."""


def judge(history: Iterable[Mapping[str, Any]], metric: str, threshold: float) -> Standing:
    """Return what the evaluations of a log say; the higher metric is the better, of equal ones the earlier.

    A gain is more than `threshold` above the best so far, as transformers.EarlyStoppingCallback counts. What is no
    number is none.
    """
    best, waited = Standing(None, None, 0), 0
    for entry in history:
        found = entry.get(f"eval_{metric}")
        if found is None:
            continue
        usable = not math.isnan(found)
        waited = 0 if usable and (best.value is None or found - best.value > threshold) else waited + 1
        if usable and (best.value is None or found > best.value):
            best = Standing(int(entry["step"]), float(found), 0)
    return Standing(best.step, best.value, waited)


class BestWeights:
    """The weights of the best evaluation so far, in a file of rank 0's `folder` that nobody changes, only replaces."""

    def __init__(self, folder: Path) -> None:
        self._file, self._partial = folder / BEST_FILE, folder / "best.partial"

    def keep(self, model: Any, weights: dict[str, torch.Tensor], whole: bool) -> None:
        """Write the best weights, as `write_weights` does."""
        write_weights(model, weights, self._partial, whole)
        os.replace(self._partial / WEIGHTS_FILE, self._file)
        shutil.rmtree(self._partial)

    def add_to(self, checkpoint: Path) -> None:
        """Make the file one of a checkpoint's, whose own weights are others."""
        _link(self._file, checkpoint / BEST_FILE)

    def take_from(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, whose own weights are the best ones where it has no others."""
        best = checkpoint / BEST_FILE
        _link(best if best.exists() else checkpoint / WEIGHTS_FILE, self._file)

    def place(self, final: Path) -> None:
        """Put the best weights in place of the last."""
        os.replace(self._file, final / WEIGHTS_FILE)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the disk has no such links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class EarlyStopping(TrainerCallback):
    """Ends a training that has gained nothing in `training.early_stopping_patience` evaluations.

    The last step is evaluated, too, where its model may be taken.
    """

    def __init__(self, find_standing: Callable[[], Standing], training: Training) -> None:
        self._find_standing, self._training = find_standing, training

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look whether the training had ended where the checkpoint was written."""
        self._judge(state, control)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raise EndedEarly where no step is left: Trainer would do one more."""
        if control.should_training_stop:
            raise EndedEarly

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have the last step evaluated; once an epoch Trainer does so itself."""
        if self._training.watches_metric and args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look whether this was one evaluation too many."""
        self._judge(state, control)

    def _judge(self, state: TrainerState, control: TrainerControl) -> None:
        patience, waited = self._training.early_stopping_patience, self._find_standing().waited
        if patience is not None and waited >= patience:
            log.info("step %d: %d evaluations without a gain, training ends", state.global_step, waited)
            control.should_training_stop = True
