"""Named places in the protocols where a test may kill, stop or break the process that reaches them.

`JOB_FAILPOINT=NAME=ACTION[@N]` arms one: at the N-th time (default first) that this process reaches
NAME it does ACTION: `kill` (SIGKILL to itself), `term` (SIGTERM), `stop` (SIGSTOP), `raise` (an
exception), `sleep:SECONDS`. Without the variable a failpoint costs one dictionary look-up.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

log = logging.getLogger("job.failpoints")

FAILPOINTS = (
    # an attempt begins: job/store/attempt.py, called by the pipeline on node 0
    "owner-acquire", "owner-acquired", "fence", "fenced", "ledger-begin", "ledger-begun", "run-claim",
    "owner-renew", "resume-fetch", "resume-fetched",
    # a checkpoint: job/train/saving.py writes it, job/store/checkpoints.py commits it in the uploading thread
    "checkpoint-write", "checkpoint-written", "files-upload", "files-uploaded", "rank-part", "rank-part-written",
    "manifest", "manifest-written", "pointer", "pointer-moved", "retire-manifest", "retire-objects", "retired",
    # a stage: job/pipeline.py
    "stage-run", "stage-record", "stage-recorded",
    # a release: job/store/release.py, job/releasing.py
    "release-files", "release-manifest", "release-manifest-written", "release-pointer", "release-pointer-moved",
    # an attempt ends
    "ledger-end", "owner-release", "owner-released",
)  # fmt: skip
"""Each is reached just before (`manifest`) or just after (`manifest-written`) the call that it names."""

_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
_reached: dict[str, int] = {}
_lock = threading.Lock()


class FailpointHit(RuntimeError):
    """What the action `raise` raises: an error that no code expects."""


def failpoint(name: str) -> None:
    """Do what JOB_FAILPOINT asks for at this place, usually nothing."""
    armed = os.environ.get("JOB_FAILPOINT")
    if not armed:
        return
    wanted, _, action = armed.partition("=")
    action, _, number = action.partition("@")
    if wanted != name:
        return
    with _lock:
        _reached[name] = _reached.get(name, 0) + 1
        due = _reached[name] == int(number or 1)
    if due:
        _act(name, action)


def _act(name: str, action: str) -> None:
    log.warning("failpoint %s: %s", name, action)  # a test reads this: the place was met
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
    elif action.startswith("sleep:"):
        time.sleep(float(action.removeprefix("sleep:")))
    else:
        raise FailpointHit(f"failpoint {name}")
