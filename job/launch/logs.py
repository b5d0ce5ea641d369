"""One log for people: short lines on stderr, secrets masked, our own records only.

A record may carry `progress` ({step, steps, percent, left_s, …}): a terminal shows it as a bar, which the next line
takes the place of, anything else as a line of JSON. `passing` records are for a bar alone.
"""

from __future__ import annotations

import io
import json
import logging
import os
import select
import threading
import time
from contextlib import suppress
from typing import Any, TextIO

from job.errors import redact
from job.streams import escape_controls


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
        line = f"{clock} {record.name.removeprefix('job.'):<9} {level}{record.getMessage()}"
        return escape_controls(redact(line))  # some of it other machines have written


_CLEAR = "\r\x1b[2K"
"""Begin the terminal's line anew: there may be a bar on it, of this process or of another one of this job."""


class _Handler(logging.StreamHandler[TextIO]):
    """Writes a line where it can be written at once: neither a closed nor a stalled terminal stops a training."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, or the bar, as this stream shows it."""
        progress = getattr(record, "progress", None)
        if not self._is_terminal():
            self.terminator = "\n"
            return super().format(record) if progress is None else _as_json(record.created, progress)
        if progress is None:
            self.terminator = "\n"
            return _CLEAR + super().format(record)
        from job.launch.bar import draw_bar

        self.terminator = "\r"  # whatever is printed next by anybody begins where the bar begins
        return _CLEAR + draw_bar(progress, os.get_terminal_size(self.stream.fileno()).columns)

    def _is_terminal(self) -> bool:
        return self.stream.isatty() and os.environ.get("TERM") != "dumb"

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or drop it when the reader of a pipe is more than a pipe's length behind."""
        try:
            if getattr(record, "passing", False) and not self._is_terminal():
                return
            if select.select([], [self.stream], [], 0)[1]:
                super().emit(record)
        except io.UnsupportedOperation:  # no file behind it, so nothing to wait for
            super().emit(record)
        except (OSError, ValueError):
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Nobody is there to be told."""


def _as_json(created: float, progress: dict[str, Any]) -> str:
    clock = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(created))
    return json.dumps({"time": clock} | progress)


def write_where_read(stream: TextIO | None, text: str, patience_s: float) -> None:
    """Write `text` as far as somebody reads it within `patience_s`; a closed, full or stalled stream raises nothing."""

    def write() -> None:
        with suppress(OSError, ValueError):  # ValueError: a stream that was closed, or has no file behind it
            data = text.encode(errors="backslashreplace")
            while data:
                data = data[os.write(handle, data) :]

    if stream is None:  # Python was started without it
        return
    with suppress(OSError, ValueError):
        stream.flush()
        handle = stream.fileno()
        writer = threading.Thread(target=write, daemon=True)
        try:
            writer.start()
        except RuntimeError:  # no thread may be started any more, of which somebody must be told
            write()
        else:
            writer.join(patience_s)


def set_up_logging(stream: TextIO | None) -> None:
    """Send records of `job.*` to `stream`; JOB_LOG_LEVEL chooses the level (default INFO)."""
    handler = _Handler(stream)
    handler.setFormatter(_Formatter())
    root = logging.getLogger("job")
    root.handlers, root.propagate = [handler], False
    level = os.environ.get("JOB_LOG_LEVEL", "INFO").upper()
    root.setLevel(level if level in logging.getLevelNamesMapping() else "INFO")
