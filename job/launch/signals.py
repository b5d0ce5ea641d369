"""Remembering that somebody asked to stop; the work happens where the flag is read."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Counts stop signals from the moment it is made; must be made in the main thread."""

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        for number in STOP_SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.name = signal.Signals(number).name
