"""Upload beside the training: one thread, newest wins, errors reach the loop.

The training thread hands over a finished folder and goes on. While one upload runs, at most one
more waits; a newer one replaces the waiting one, and a failed one. A permanent error, or
`max_unsynced_s` without a success, is raised at the next `submit` or `check`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from job.errors import Unreachable

log = logging.getLogger("job.store")

_RETRY_S = 5.0
_WAIT_S = 0.5


class BackgroundUploader:
    """Runs `upload(folder)` for submitted folders; `discard(folder)` for those that a newer one replaced."""

    def __init__(self, upload: Callable[[Path], None], discard: Callable[[Path], None], max_unsynced_s: float) -> None:
        self._upload, self._discard, self._max_unsynced_s = upload, discard, max_unsynced_s
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
        self._thread.start()

    def submit(self, folder: Path) -> None:
        """Queue a folder without waiting; raise the error of an earlier upload, if any."""
        self.check()
        with self._changed:
            replaced, self._waiting = self._waiting, folder
            self._changed.notify_all()
        if replaced:
            self._discard(replaced)

    def check(self) -> None:
        """Raise what went wrong in the background."""
        if self._error:
            raise self._error

    def close(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Wait until all that was submitted is uploaded, then stop; raise what went wrong.

        `on_wait` is called at least once a second meanwhile: who waits is alive.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        while self._thread.is_alive():
            on_wait()
            self._thread.join(_WAIT_S)
        self.check()

    def _work(self) -> None:
        unsynced_since = 0.0
        while folder := self._next():
            unsynced_since = unsynced_since or time.monotonic()
            try:
                self._upload(folder)
                unsynced_since = 0.0
            except Unreachable as error:
                if time.monotonic() - unsynced_since > self._max_unsynced_s:
                    self._error = error
                    return
                log.warning("%s; training goes on, the upload is tried again", error)
                self._try_again(folder)
            except BaseException as error:  # crosses to the training thread, which raises it
                self._error = error
                return

    def _next(self) -> Path | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            folder, self._waiting = self._waiting, None
            return folder

    def _try_again(self, folder: Path) -> None:
        """Wait a while, then put a folder back in the queue, unless a newer one waits there."""
        time.sleep(_RETRY_S)
        with self._changed:
            replaced = folder if self._waiting else None
            self._waiting = self._waiting or folder
        if replaced:
            self._discard(replaced)
