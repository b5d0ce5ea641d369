"""What a rank shows while it trains: lines on the terminal, signs of life, and errors from the background."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.errors import Diverged
from job.liveness import beat
from job.train.failures import explain_overflow

log = logging.getLogger("job.train")


class Heartbeat(TrainerCallback):
    """Beats from the main thread once the first step is done; until then the process's own thread beats as well.

    Loading and compiling may take longer than any step; launch.join_timeout_min bounds them.
    """

    def __init__(self) -> None:
        self._begun = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Beat after an optimizer step."""
        self._begun = True
        beat()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Beat after a micro-batch that only accumulates."""
        self._beat_on()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Beat inside an evaluation."""
        self._beat_on()

    def _beat_on(self) -> None:
        beat(takes_over=self._begun)


class ScaleFloor(TrainerCallback):
    """Stops an fp16 training whose gradients overflow at every scale of the loss.

    torch's scaler has no lowest scale: it would halve it and skip every step until the end.
    `read_scale` returns the scale, None without a scaler.
    """

    LOWEST = 1e-4
    """fairseq's --min-loss-scale; a training that learns stays above 1."""

    def __init__(self, read_scale: Callable[[], float | None]) -> None:
        self._read_scale = read_scale

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raise Diverged (14) once the scale is below LOWEST."""
        scale = self._read_scale()
        if scale is not None and scale < self.LOWEST:
            raise explain_overflow(f"when the loss is scaled by {scale:.0e} (step {state.global_step})")


class Progress(TrainerCallback):
    """One line per logging step on rank 0; stops on a loss that is no number.

    `check` raises what went wrong in the background (an upload); it is called after every step. `metric`: the task's.
    """

    def __init__(self, check: Callable[[], None], metric: str, speak: bool) -> None:
        self._check, self._metric, self._speak = check, metric, speak
        self._started, self._first_step = time.monotonic(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock at the step that training begins with."""
        self._started, self._first_step = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raise an error of the background as soon as it is there."""
        self._check()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Check the loss, then speak."""
        logs = logs or {}
        loss = logs.get("loss", logs.get("train_loss", 0.0))
        if loss != loss or abs(loss) == float("inf"):
            raise Diverged(
                f"training.learning_rate: the loss is {loss} at step {state.global_step}; lower the rate, warm up "
                "longer, or use precision: fp32"
            )
        if self._speak and "loss" in logs:
            log.info("%s  loss %.4f  lr %.2e", self._where(state), logs["loss"], logs["learning_rate"])
        elif self._speak and (value := logs.get(f"eval_{self._metric}")) is not None:
            log.info("%s  validation %s %.4f", self._where(state), self._metric.replace("_", " "), value)

    def _where(self, state: TrainerState) -> str:
        done = max(state.global_step - self._first_step, 1)
        left_s = (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)
        share = state.global_step / max(state.max_steps, 1)
        return f"step {state.global_step}/{state.max_steps} ({share:.0%}, {left_s // 60:.0f}:{left_s % 60:02.0f} left)"
