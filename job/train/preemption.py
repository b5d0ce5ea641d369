"""Stopping together: a signal at any rank stops every rank at the same optimizer step.

The handler only sets a flag. After each step the flags are reduced (max) on a CPU group without
waiting; the answer of step t is read after step t+1, so no step is delayed by the vote.
"""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger("job.train")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopVote(TrainerCallback):
    """Ends training with a checkpoint once any rank was told to stop; `stopped` says so afterwards."""

    def __init__(self) -> None:
        self.stopped = False
        self._told = False
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Read the last vote, cast the next one."""
        if self._decide() and state.global_step < state.max_steps:
            log.info("told to stop: saving a checkpoint at step %d", state.global_step)
            self.stopped = control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        return control

    def _decide(self) -> bool:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._told
        verdict = False
        if self._pending:
            work, votes = self._pending
            work.wait()
            verdict = bool(votes.item())
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        votes = torch.tensor([int(self._told)], dtype=torch.int32)
        self._pending = (dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group, async_op=True), votes)
        return verdict
