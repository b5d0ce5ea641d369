"""What a child process owes its parent: to die with it, and to show that it is alive.

The supervisor names a file in JOB_HEARTBEAT. A thread touches it until the stage beats for itself:
a stopped process is seen by either, a hang of the main thread only where the stage beats.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PERIOD_S = 1.0
_by_itself = threading.Event()


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG).

    `parent` is the process that started this one, as it said itself: it may be gone before this is called. Without it
    the process that is the parent now is meant.
    """
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def start_beating(limit_s: float) -> None:
    """Beat from a thread until the stage calls `beat` itself; one that has not after `limit_s` falls silent."""
    deadline = time.monotonic() + limit_s

    def work() -> None:
        _touch()
        while time.monotonic() < deadline and not _by_itself.wait(_PERIOD_S):
            _touch()

    threading.Thread(target=work, name="heartbeat", daemon=True).start()


def beat(*, takes_over: bool = True) -> None:
    """Show that the caller goes on; from the first call that `takes_over` nobody else does it for this process."""
    if takes_over:
        _by_itself.set()
    _touch()


def _touch() -> None:
    file = os.environ.get("JOB_HEARTBEAT")
    if file:
        with suppress(OSError):  # a full disk is found by those who must write
            Path(file).touch()
