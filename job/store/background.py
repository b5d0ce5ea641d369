"""Upload beside the training: one thread, newest wins, errors reach the loop.

The training thread hands over a finished folder and goes on. While one upload runs, at most one
more waits; a newer one replaces the waiting one, and a failed one. A permanent error, or
`max_unsynced_s` without a success, is raised at the next `submit` or `check`.

A checkpoint of several ranks is whole only if all of them upload the same step. Their queues are
`in_step`: what is submitted waits until the loop, which asked all ranks `is_free`, opens the gate.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from job.errors import Unreachable

log = logging.getLogger("job.store")

_RETRY_S = 5.0
_WAIT_S = 0.5


class BackgroundUploader:
    """Runs `upload(folder)` for submitted folders; `discard(folder)` for those that a newer one replaced."""

    def __init__(
        self,
        upload: Callable[[Path], None],
        discard: Callable[[Path], None],
        max_unsynced_s: float,
        *,
        in_step: bool = False,
    ) -> None:
        self._upload, self._discard, self._max_unsynced_s = upload, discard, max_unsynced_s
        self._in_step = in_step
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._let_go: deque[Path] = deque()
        self._running = self._closed = False
        self._open = in_step  # nobody uploads anything before the first checkpoint
        self._asked_before = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
        self._thread.start()

    def submit(self, folder: Path) -> None:
        """Queue a folder without waiting; raise the error of an earlier upload, if any."""
        self.check()
        replaced = None
        with self._changed:
            if self._open:
                self._let_go.append(folder)
                self._open, self._asked_before = False, True
            else:
                replaced, self._waiting = self._waiting, folder
            self._changed.notify_all()
        if replaced:
            self._discard(replaced)

    @property
    def is_free(self) -> bool:
        """Tell whether no upload runs or was let go."""
        with self._changed:
            return not (self._running or self._let_go)

    def open_gate(self) -> None:
        """Let what waits go, or else the next that is submitted: the queues of all ranks are free.

        Every rank must call this between the same two submits. They were asked before this rank's last
        submit where that went through the gate, and then the answer says nothing.
        """
        with self._changed:
            if self._asked_before:
                self._asked_before = False
            elif self._waiting:
                self._let_go.append(self._waiting)
                self._waiting = None
                self._changed.notify_all()
            else:
                self._open = True

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
            self._running = False
            self._changed.wait_for(lambda: self._let_go or self._closed or (self._waiting and not self._in_step))
            self._running = True
            if self._let_go:
                return self._let_go.popleft()
            folder, self._waiting = self._waiting, None
            return folder

    def _try_again(self, folder: Path) -> None:
        """Wait a while, then put a folder back in the queue, unless a newer one waits there and may go instead."""
        time.sleep(_RETRY_S)
        replaced = None
        with self._changed:
            if self._in_step:
                self._let_go.appendleft(folder)
            else:
                replaced = folder if self._waiting else None
                self._waiting = self._waiting or folder
        if replaced:
            self._discard(replaced)
