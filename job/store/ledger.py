"""The attempt ledger, `attempts/<epoch>.json`: who tried, what happened, and when it is time to give up.

One object an attempt, written by its supervisor only: once at the beginning, at every event, and at
the end. An attempt whose record has no end was killed. Times are for people; nothing decides by them.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from job.errors import Fenced, Interrupted, JobError, NoProgress, NoValidCheckpoint, Unreachable
from job.failpoints import failpoint
from job.store.records import Record, dig
from job.store.runs import RunStore

log = logging.getLogger("job.store")

MAX_FRUITLESS = 3
"""So many attempts in a row without a newer checkpoint or stage record, and the next refuses (18)."""

WAITED_IN_VAIN = "not all nodes came"
"""The event of an attempt whose work has not begun, so that it does not count: a cluster may be full for long."""

_NOT_COUNTED = (Interrupted.exit_code, Fenced.exit_code, Unreachable.exit_code)
_LOOK_BACK = 20
_KEPT_EVENTS = 500


class Ledger:
    """This attempt's record. `work` identifies what is tried, `progress` what is committed when it begins."""

    def __init__(self, store: RunStore, epoch: int, work: str, progress: str) -> None:
        self._store, self._epoch = store, epoch
        began = {"epoch": epoch, "host": platform.node(), "pid": os.getpid(), "began": _now()}
        self._record: Record = began | {"work": work, "progress": progress, "events": []}
        self._lock = threading.Lock()  # a transfer that was given up notes from a thread of its own

    def begin(self) -> None:
        """Write that this attempt begins; raise NoProgress (18) when the last ones came to nothing."""
        fruitless = list(self._find_fruitless())
        failpoint("ledger-begin")
        self._write()
        failpoint("ledger-begun")
        if len(fruitless) >= MAX_FRUITLESS:
            ends = "; ".join(f"attempt {epoch}: {_describe_end(record)}" for epoch, record in reversed(fruitless))
            raise NoProgress(
                f"{self._store.run_id}: {len(fruitless)} attempts in a row committed nothing new ({ends}); mend the "
                "cause, then start the run again, which gives it three more"
            )

    def note(self, event: str, **about: Any) -> None:
        """Add an event; a store that cannot be written now does not stop the run."""
        with self._lock:
            self._record["events"] = [*self._record["events"], {"at": _now(), "event": event} | about][-_KEPT_EVENTS:]
            try:
                self._write()
            except JobError as error:
                log.warning("the event could not be noted: %s", error)

    def end(self, code: int, reason: str, retried: bool = False) -> None:
        """Write how this attempt ended; `retried` when the same process begins another at once, which then counts."""
        failpoint("ledger-end")
        with self._lock:
            self._record |= {"ended": _now(), "exit_code": code, "reason": reason, "retried": retried}
            self._write()

    def _write(self) -> None:
        self._store.write_json(f"attempts/{self._epoch}.json", self._record)

    def _find_fruitless(self) -> Iterator[tuple[int, Record]]:
        """Yield (epoch, record) of the attempts before, newest first, while they tried the same and brought nothing."""
        for epoch in range(self._epoch - 1, max(self._epoch - 1 - _LOOK_BACK, 0), -1):
            record = read_attempt(self._store, epoch)
            if record is None or record.get("retried") or record.get("exit_code") in _NOT_COUNTED:
                continue
            if any(dig(event, "event") == WAITED_IN_VAIN for event in record.get("events") or []):
                continue
            same = all(record.get(key) == self._record[key] for key in ("work", "progress"))
            if not same or record.get("exit_code") in (0, NoProgress.exit_code):
                return
            if "exit_code" not in record:
                log.warning("attempt %s ended without a word: killed, most often for lack of memory", epoch)
            yield epoch, record


def read_attempt(store: RunStore, epoch: int) -> Record | None:
    """Return the record of an attempt; None where there is none, or a damaged one."""
    try:
        return store.read_json(f"attempts/{epoch}.json")
    except NoValidCheckpoint:
        return None


def describe_attempt(record: Record) -> Record:
    """Return what a report tells of an attempt; `resumed_from` is the step of its checkpoint, None at the beginning."""
    events = record.get("events")
    events = [event for event in events if isinstance(event, dict)] if isinstance(events, list) else []
    steps = [event.get("step") for event in events if event.get("event") == "resumed"]
    about = {key: record.get(key) for key in ("epoch", "began", "ended", "exit_code")}
    return about | {"resumed_from": steps[-1] if steps else None}


def _describe_end(record: Record) -> str:
    if "exit_code" not in record:
        return "killed without a word (memory is the usual cause)"
    return f"{record['exit_code']}, {str(record.get('reason'))[:200]}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
