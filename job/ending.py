"""How a verb ends: its exit code, one sentence on stderr, and for `job run` the result in all places where it is read.

Heavy rooms are imported only where something is to be said.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from job.streams import escape_controls

_TERMINATION_BYTES = 4096
_STDERR_PATIENCE_S, _RESULT_PATIENCE_S = 5.0, 60.0
"""How long the end of a run waits for who reads its tables, and for who reads its result."""


def finish(action: Callable[[], int], as_json: bool = False) -> NoReturn:
    """Run a verb; turn its errors into one sentence each on stderr, and an exit code."""
    from job.launch.logs import set_up_logging
    from job.launch.verdict import judge_error

    set_up_logging(sys.stderr)
    try:
        code = action()
        sys.stdout.flush()  # here, where a pipe that nobody reads any more is no error
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # of a verb that answers: whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except Exception as error:
        code = _report_error(judge_error(error), as_json)
    raise SystemExit(code)


@contextmanager
def early_result(work: Path, run_id: str, node_rank: int) -> Iterator[None]:
    """Leave a result also where a run with a known name never began: a batch script looks there for the code.

    That is node 0's; the others wait for it to speak first, for a launcher ends all with the first that fails.
    """
    from job.errors import JobError

    try:
        yield
    except JobError as error:
        if node_rank:
            from job.launch.line import LAST_CALL_S

            time.sleep(LAST_CALL_S)
        elif run_id:
            from job.launch.verdict import judge_error
            from job.recipe import write_json

            with suppress(OSError):
                result = {"run_id": run_id, "status": "failed", "release": None} | judge_error(error)
                write_json(work / "runs" / run_id / "result.json", result)
        raise


def _report_error(verdict: dict[str, Any], as_json: bool) -> int:
    text = "".join(f"error: {escape_controls(line)}\n" for line in verdict["reason"].splitlines() or [""])
    if as_json:
        leave_result({"run_id": None, "status": "failed", **verdict, "release": None}, text)
    else:
        print(text, end="", file=sys.stderr)
    return int(verdict["exit_code"])


def leave_result(result: dict[str, Any], text: str) -> None:
    """Say how a run ended: `text` to people, a line of JSON to programs; no pipe that nobody reads changes its code."""
    from job.launch.logs import write_where_read

    leave_termination_message(result)
    write_where_read(sys.stderr, text, _STDERR_PATIENCE_S)
    write_where_read(sys.stdout, json.dumps(result) + "\n", _RESULT_PATIENCE_S)


def leave_termination_message(result: dict[str, Any]) -> None:
    """Kubernetes shows this file as the container's last word; elsewhere it does not exist."""
    message = Path(os.environ.get("JOB_TERMINATION_LOG", "/dev/termination-log"))
    if message.exists():
        with suppress(OSError):
            message.write_bytes(fit_termination_message(result))


def fit_termination_message(result: dict[str, Any]) -> bytes:
    """Return JSON of at most 4,096 bytes (more than that Kubernetes cuts off): texts are shortened until it fits."""
    for length in (3000, 1000, 300, 100):
        about = {key: result.get(key) for key in ("run_id", "status", "exit_code", "reason", "release")}
        about = {key: value[:length] if isinstance(value, str) else value for key, value in about.items()}
        data = json.dumps(about).encode()
        if len(data) <= _TERMINATION_BYTES:
            break
    return data
