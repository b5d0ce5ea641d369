"""Remembering that somebody asked to stop; the work happens where the flag is read."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Counts stop signals from the moment it is made; must be made in the main thread.

    `time_limit_min` counts as a stop signal when it is over (SIGALRM).
    """

    def __init__(self, time_limit_min: int | None = None) -> None:
        self.count = 0
        self.name = ""
        for number in (*STOP_SIGNALS, signal.SIGALRM):
            signal.signal(number, self._hear)
        if time_limit_min:
            signal.setitimer(signal.ITIMER_REAL, 60.0 * time_limit_min)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.name = signal.Signals(number).name
