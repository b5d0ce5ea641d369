"""Remembering that somebody asked to stop; the work happens where the flag is read."""

from __future__ import annotations

import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

_SAME_REQUEST_S = 0.25
"""A terminal sends Ctrl-C to all processes, a scheduler its signal to all of a step; who stands above passes it on."""
_MIN_RESERVE_S = 5.0
_UNMEASURED_S = 60.0
"""What is kept in reserve before any checkpoint was saved."""


class StopRequest:
    """Counts stop requests from the moment it is made; must be made in the main thread.

    Signals that follow each other at once are one request, which came on two ways.
    `time_limit_min` counts as a stop signal when it is over (SIGALRM), or `apply_deadline` finds that
    what is left of it is needed for saving.
    """

    def __init__(self, time_limit_min: float | None = None) -> None:
        self.count = 0
        self.name = ""
        self._heard_at = -_SAME_REQUEST_S
        self._limit_s = 60.0 * time_limit_min if time_limit_min else None
        self._began = time.monotonic()
        for number in (*STOP_SIGNALS, signal.SIGALRM):
            signal.signal(number, self._hear)
        if self._limit_s:
            signal.setitimer(signal.ITIMER_REAL, self._limit_s)

    def apply_deadline(self, saving_s: float) -> None:
        """Count the time limit as a stop signal, early enough to save: 2 × `saving_s`, at most half of the limit.

        `saving_s` is what the last checkpoint took, 0 before the first.
        """
        if self._limit_s is None or self.count:
            return
        reserve_s = min(max(2 * saving_s, _MIN_RESERVE_S) if saving_s else _UNMEASURED_S, self._limit_s / 2)
        if time.monotonic() - self._began > self._limit_s - reserve_s:
            self.count, self.name = 1, "launch.time_limit_min"

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGALRM and self.count:
            return  # whoever was told before is saving by now, and a second request would cut that short
        if self.count and time.monotonic() - self._heard_at < _SAME_REQUEST_S:
            return
        self._heard_at = time.monotonic()
        self.count += 1
        self.name = "launch.time_limit_min" if number == signal.SIGALRM else signal.Signals(number).name
