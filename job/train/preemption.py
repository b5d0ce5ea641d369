"""Stopping together: a signal at any rank stops every rank at the same step, also inside an evaluation.

The handler only sets a flag. After each optimizer step and prediction step the flags are reduced
(max) on a CPU group without waiting; the answer is read one step later, so no step is delayed by
the vote. An evaluation that was cut short is made up for when training goes on.
"""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.store.background import BackgroundUploader

log = logging.getLogger("job.train")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_SAME_REQUEST_S = 1.0
"""A batch system signals every process, the supervisor and the loading processes pass it on: that is one request."""


class ToldTwice(BaseException):
    """A second stop signal: leave at once. No `except Exception` on the way may take it for an error of its own."""


class EvaluationCut(Exception):
    """All ranks leave the evaluation at this prediction step."""


class StopVote(TrainerCallback):
    """Ends training with a checkpoint once any rank was told to stop; `stopped` says so afterwards.

    `group` is a CPU (gloo) group of all ranks, None for one rank. `uploads` are this rank's: the votes also say
    whether every rank's queue is free, so that all of them send the same step next.
    """

    def __init__(self, group: Any, uploads: BackgroundUploader | None = None) -> None:
        self.stopped = False
        self._told_at: float | None = None
        self._group, self._uploads = group, uploads
        self._pending: tuple[Any, torch.Tensor] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._hear)

    @property
    def told(self) -> bool:
        """Tell whether this rank heard a stop signal, also where it came too late for a vote."""
        return self._told_at is not None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._told_at is not None and now - self._told_at > _SAME_REQUEST_S:
            raise ToldTwice
        self._told_at = self._told_at or now

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Read the last vote, cast the next one."""
        if self._decide() and state.global_step < state.max_steps:
            log.info("told to stop: saving a checkpoint at step %d", state.global_step)
            self.stopped = control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Trainer calls this also when it stops; an evaluation then would use up the grace."""
        control.should_evaluate = control.should_evaluate and not self.stopped
        return control

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Vote as after a step; raise EvaluationCut at the same prediction step on every rank."""
        if self._decide():
            log.info("told to stop: leaving the evaluation of step %d, which is made up for later", state.global_step)
            self.stopped = True
            raise EvaluationCut

    def _decide(self) -> bool:
        if self._group is None:
            return self.told
        if self._pending:
            work, votes = self._pending
            work.wait()
            self._pending = None
            told, busy = votes.tolist()
            if not busy and self._uploads:
                self._uploads.open_gate()
            if told:
                return True
        busy = self._uploads is not None and not self._uploads.is_free
        votes = torch.tensor([int(self.told), int(busy)], dtype=torch.int32)
        self._pending = (dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group, async_op=True), votes)
        return False


class EvaluationDebt(TrainerCallback):
    """Has Trainer evaluate before the first step when the checkpoint's step should have been evaluated and was not.

    `to_the_last`: the last step should be in any case.
    """

    def __init__(self, to_the_last: bool) -> None:
        self._to_the_last = to_the_last

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Compare the step with the log that came with the checkpoint; its intervals do not bind this attempt."""
        state.compute_steps(args, state.max_steps)
        done = any("eval_loss" in entry and entry.get("step") == state.global_step for entry in state.log_history)
        args.eval_on_start = state.global_step > 0 and not done and self._is_due(args, state)

    def _is_due(self, args: TrainingArguments, state: TrainerState) -> bool:
        ended = state.global_step >= state.max_steps
        if args.eval_strategy == "steps":
            return state.global_step % state.eval_steps == 0 or (ended and self._to_the_last)
        return args.eval_strategy == "epoch" and (ended or float(state.epoch or 0).is_integer())
