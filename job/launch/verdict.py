"""From an exception to an exit code and a one-line reason (DESIGN §2), and which of several counts."""

from __future__ import annotations

import errno
import logging
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from job.errors import (
    PERMANENT,
    Fenced,
    Interrupted,
    JobError,
    PeerLost,
    ResourceExhausted,
    exceeds_limits,
    lacks_answer,
    lacks_disk,
    lacks_memory,
    redact,
)

log = logging.getLogger("job.launch")

_TAIL_LINES = 15
_MAY_CHANGE = ("max_micro_batch_size",)
"""Keys of `training` that an outcome may ask to change before another try."""
_NODE_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


@dataclass(frozen=True)
class Verdict:
    """Exit code and reason of a group; `record` is what its first process returned.

    `retry` and `together` see JobError and Interrupted.
    """

    code: int
    reason: str
    record: dict[str, Any]
    retry: dict[str, int] | None = None
    together: bool = False

    @staticmethod
    def of(error: BaseException) -> Verdict:
        """Return the verdict on what an error ended."""
        judged, about = judge_error(error), {name: getattr(error, name, None) for name in ("retry", "together")}
        return Verdict(judged["exit_code"], judged["reason"], {}, about["retry"], bool(about["together"]))

    @staticmethod
    def parse(outcome: Mapping[str, Any]) -> Verdict:
        """Return what a process, or another node, has written down."""
        code, reason, retry = outcome.get("code"), outcome.get("reason"), outcome.get("retry")
        if not isinstance(code, int) or not 0 <= code <= 255:
            code, reason = 1, f"an outcome without a code: {dict(outcome)!r:.200}"
        if not isinstance(retry, dict) or not all(name in _MAY_CHANGE and type(retry[name]) is int for name in retry):
            retry = None
        return Verdict(code, str(reason), outcome.get("record") or {}, retry, bool(outcome.get("together")))

    def describe(self) -> dict[str, Any]:
        """Return what `parse` reads, without the record, which stays on its node."""
        return asdict(self) | {"record": {}}

    def as_error(self) -> JobError:
        """Return the error that ends the run with this verdict."""
        if self.code == Interrupted.exit_code:
            return Interrupted(self.reason, together=self.together)
        error = JobError(self.reason, retry=self.retry)
        error.exit_code = self.code
        return error


def judge_error(error: BaseException) -> dict[str, Any]:
    """Return {exit_code, reason} of what ended a process; an unexpected error also logs the end of its traceback."""
    if isinstance(error, JobError):
        return {"exit_code": error.exit_code, "reason": redact(str(error))}
    if lack := _explain_lack(error):
        return {"exit_code": ResourceExhausted.exit_code, "reason": lack}
    for line in "".join(traceback.format_exception(error)).rstrip().splitlines()[-_TAIL_LINES:]:
        log.error("  %s", line)
    return {"exit_code": 1, "reason": redact(f"unexpected {type(error).__name__}: {error or 'no message'}")}


def _explain_lack(error: BaseException) -> str:
    """Return what this node lacks, and the next step; "" for an error that says nothing of the kind."""
    if exceeds_limits(error):
        return f"{redact(str(error))}; raise what limits open files and processes (ulimit -n and -u, a pids limit)"
    if lacks_memory(error):
        return "memory is exhausted; use a smaller batch or a larger machine"
    if lacks_answer(error):
        return f"{redact(str(error))}; a disk or a mount of this node is broken, see dmesg; run again on another"
    if lacks_disk(error) and not getattr(error, "filename", None):
        return f"{redact(str(error))}; free space, or give --work-dir another disk"
    if isinstance(error, OSError) and error.errno in _NODE_TROUBLE:
        return f"{error.strerror} ({error.filename}); free space, or give --work-dir a folder that this user may write"
    return ""


def decide(verdicts: list[Verdict]) -> Verdict:
    """The first permanent failure decides, then a lost lease, then any other failure, a stop, a lost peer last."""
    failed = [verdict for verdict in verdicts if verdict.code]
    return min(failed, key=_rank) if failed else verdicts[0]


def _rank(verdict: Verdict) -> int:
    if verdict.code in PERMANENT:
        return 0
    return {Fenced.exit_code: 1, Interrupted.exit_code: 3, PeerLost.exit_code: 4}.get(verdict.code, 2)
