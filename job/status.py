"""`status.json` in the run's prefix: what `job show` tells of a run that goes on. Nothing depends on it.

One small object, written at every change of phase, and while the ranks train every few seconds with how far they are.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from job.errors import JobError
from job.recipe import Run
from job.store import Attempt

log = logging.getLogger("job.pipeline")

_PERIOD_S = 5.0


class Status:
    """The status of one attempt of a run."""

    def __init__(self, run: Run, attempt: Attempt) -> None:
        self._attempt = attempt
        about = {"run_id": run.run_id, "name": run.recipe.name, "epoch": attempt.epoch}
        self._about: dict[str, Any] = about | {"host": platform.node(), "pid": os.getpid()}
        self._lock, self._phase = threading.Lock(), ""

    def write(self, phase: str) -> None:
        """Say that a phase begins; a store that cannot be written now does not stop the run."""
        with self._lock:
            self._phase = phase
            self._write({})

    @contextmanager
    def follow(self, file: Path) -> Iterator[None]:
        """Add what `file` says of the present phase, as often as it changes but not oftener than every 5 s."""
        ended = threading.Event()
        work = threading.Thread(target=self._follow, args=(file, self._phase, ended), name="status", daemon=True)
        work.start()
        try:
            yield
        finally:
            ended.set()  # not waited for: the store may be out, and what it writes late is of a phase that is over

    def _follow(self, file: Path, phase: str, ended: threading.Event) -> None:
        told: dict[str, Any] = {}
        while not ended.wait(_PERIOD_S):
            progress = _read_progress(file)
            with self._lock:
                if progress != told and phase == self._phase and not ended.is_set():
                    self._write({"progress": progress})
            told = progress

    def _write(self, more: dict[str, Any]) -> None:
        try:
            self._attempt.check()
            self._attempt.store.write_json("status.json", self._about | {"phase": self._phase} | more)
        except (JobError, OSError) as error:
            log.warning("status.json could not be written: %s", error)


def _read_progress(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
