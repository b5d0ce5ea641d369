"""From an exception to an exit code and a one-line reason (DESIGN §2)."""

from __future__ import annotations

import errno
import logging
import traceback
from typing import Any

from job.errors import JobError, ResourceExhausted, lacks_memory, redact

log = logging.getLogger("job.launch")

_TAIL_LINES = 15
_NODE_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO)


def judge_error(error: BaseException) -> dict[str, Any]:
    """Return {exit_code, reason} of what ended a process; an unexpected error also logs the end of its traceback."""
    if isinstance(error, JobError):
        return {"exit_code": error.exit_code, "reason": redact(str(error))}
    if lacks_memory(error):
        reason = "memory is exhausted; use a smaller batch or a larger machine"
        return {"exit_code": ResourceExhausted.exit_code, "reason": reason}
    if isinstance(error, OSError) and error.errno in _NODE_TROUBLE:
        reason = (
            f"{error.strerror} ({error.filename}); free space, or give --work-dir a folder that this user may write"
        )
        return {"exit_code": ResourceExhausted.exit_code, "reason": reason}
    for line in "".join(traceback.format_exception(error)).rstrip().splitlines()[-_TAIL_LINES:]:
        log.error("  %s", line)
    return {"exit_code": 1, "reason": redact(f"unexpected {type(error).__name__}: {error or 'no message'}")}
