"""A process' sign of life: the file that it touches (`job.liveness`), seen with the observer's own clock."""

from __future__ import annotations

import time
from pathlib import Path

_STATES = {"T": "stopped", "t": "traced", "D": "waiting for a disk", "Z": "ended", "R": "running", "S": "waiting"}


class Pulse:
    """Watches one process: seconds without a change, and until the file is there at all."""

    def __init__(self, pid: int, file: Path, hang_timeout_s: float, start_timeout_s: float) -> None:
        self._pid, self._file = pid, file
        self._hang_timeout_s, self._start_timeout_s = hang_timeout_s, start_timeout_s
        self._mark = 0
        self._changed = time.monotonic()

    def is_over(self) -> bool:
        """Tell whether the file has not changed for too long."""
        limit_s = self._hang_timeout_s if self._look() else self._start_timeout_s
        return self.silence_s() > limit_s

    def forgive(self, seconds: float) -> None:
        """Take so much from the silence: the observer himself stood still."""
        self._changed = min(self._changed + seconds, time.monotonic())

    def silence_s(self) -> float:
        """Return for how many seconds no change was seen."""
        return time.monotonic() - self._changed

    def is_stopped(self) -> bool:
        """Tell whether somebody stopped the process (SIGSTOP, a debugger)."""
        return self._state() in ("T", "t")

    def describe_state(self) -> str:
        """Return the process' state in words."""
        state = self._state()
        return f"process {self._pid} is {_STATES.get(state, state or 'gone')}"

    def _look(self) -> bool:
        """Remember when the file changed; tell whether it was ever there."""
        try:
            mark = self._file.stat().st_mtime_ns
        except OSError:
            return bool(self._mark)
        if mark != self._mark:
            self._mark, self._changed = mark, time.monotonic()
        return True

    def _state(self) -> str:
        try:
            return Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return ""
