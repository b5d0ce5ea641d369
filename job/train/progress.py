"""What a rank shows while it trains: how far it is, signs of life, and errors from the background.

How progress looks decides who shows it: `launch/logs.py` a terminal or a log, `status.py` the store.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.errors import Diverged
from job.liveness import beat
from job.train.failures import explain_overflow

log = logging.getLogger("job.train")

_SHOWN = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
_BAR_PERIOD_S, _FILE_PERIOD_S = 0.25, 2.0


class BeforeSteps(TrainerCallback):
    """Calls `prepare` once model and optimizer are what they are trained as."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare = prepare

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """See the class."""
        self._prepare()


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


class Pace:
    """Tokens in a second of training; what happens within `pause` (evaluation, writing) is no training.

    It counts what this rank computes, times the ranks: all have about the same number of tokens in every batch.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._tokens, self._paused_s = 0, 0.0
        self._since: float | None = None

    def add(self, tokens: int) -> None:
        """Count the tokens of a micro-batch that begins; the first starts the clock."""
        self._since = self._since or time.monotonic()
        self._tokens += tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock meanwhile."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused_s += time.monotonic() - began

    def take(self) -> float:
        """Return tokens a second since the last call, and begin anew."""
        now = time.monotonic()
        seconds = now - (self._since or now) - self._paused_s
        pace = self._tokens * self._world_size / max(seconds, 1e-3)
        self._tokens, self._paused_s, self._since = 0, 0.0, now
        return round(pace, 1)


class Progress(TrainerCallback):
    """Tells of rank 0 how far it is: log records that carry `progress`, and a small file, which the supervisor puts
    into the store; stops on a loss that is no number.

    `check` raises what went wrong in the background (an upload); it is called after every step. `metric`: the task's.
    `tell` writes the file; None on other ranks than 0, which say nothing.
    """

    def __init__(self, check: Callable[[], None], metric: str, tell: Callable[[dict[str, Any]], None] | None) -> None:
        self._check, self._metric, self._tell = check, metric, tell
        self._started, self._first_step = time.monotonic(), 0
        self._told, self._shown = 0.0, 0.0
        self._last: dict[str, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock at the step that training begins with."""
        self._started, self._first_step = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raise an error of the background as soon as it is there; move the bar on."""
        self._check()
        if self._tell and time.monotonic() - self._shown > _BAR_PERIOD_S:
            self._show(state, {}, passing=True)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Check the loss, then tell of it."""
        logs = logs or {}
        loss = logs.get("loss", logs.get("train_loss", 0.0))
        if loss != loss or abs(loss) == float("inf"):
            raise Diverged(
                f"training.learning_rate: the loss is {loss} at step {state.global_step}; lower the rate, warm up "
                "longer, or use precision: fp32"
            )
        if self._tell and "loss" in logs:
            self._show(state, {key: float(f"{logs[key]:.4g}") for key in _SHOWN if key in logs})
        elif self._tell and (value := logs.get(f"eval_{self._metric}")) is not None:
            self._show(state, {f"validation_{self._metric}": value})

    def _show(self, state: TrainerState, news: dict[str, Any], passing: bool = False) -> None:
        """Say where the training is, and what is new; a `passing` record is for a bar alone."""
        self._last |= news
        where = self._locate(state)
        log.info("", extra={"progress": where | (self._last if passing else news), "passing": passing})
        self._shown = now = time.monotonic()
        if self._tell and now - self._told > _FILE_PERIOD_S:
            self._told = now
            with suppress(OSError):  # a full disk is found by those who must write
                self._tell(where | self._last)

    def _locate(self, state: TrainerState) -> dict[str, Any]:
        step, steps = state.global_step, max(state.max_steps, 1)
        left_s = (time.monotonic() - self._started) / max(step - self._first_step, 1) * (steps - step)
        return {"step": step, "steps": steps, "percent": round(100 * step / steps), "left_s": round(left_s)}
