"""The shell around a stage: `python -m job.launch.worker module:function RUN_FOLDER OUTCOME`.

It dies with its supervisor, sends what libraries print to a log file, and leaves an outcome file
with code, reason and the function's record, written atomically before it exits. Where JOB_AHEAD is
set, it imports the module and then waits on stdin for variables, a JSON object, before it begins.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from job.errors import Interrupted
from job.launch.logs import set_up_logging
from job.launch.verdict import Verdict
from job.liveness import die_with_parent, start_beating
from job.recipe import Run, write_json

_OUTCOME_BYTES = 1 << 16


def main(target: str, folder: Path, outcome: Path) -> int:
    """Run the function, write the outcome, return the exit code."""
    reserve = outcome.with_suffix(".reserve")
    try:
        try:
            _prepare(target, folder / "logs" / f"{outcome.stem}.log")
            _reserve_disk(reserve)
            record = _resolve(target)(Run.load(folder))
        finally:
            _handle_stops(signal.SIG_IGN)  # from here on nothing may come between the work and its outcome
        verdict = Verdict(0, "", record or {})
    except BaseException as error:
        if isinstance(error, _Stopped):
            error = Interrupted("told to stop; what was committed is kept, run again to go on")
        verdict = Verdict.of(error)
    reserve.unlink(missing_ok=True)
    write_json(outcome, asdict(verdict))
    return verdict.code


def _reserve_disk(path: Path) -> None:
    """Occupy what an outcome needs, so that a full disk can be told of; where not even that fits, the disk is full."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(_OUTCOME_BYTES))


def _prepare(target: str, log_file: Path) -> None:
    """Return when the stage may begin; until then nothing that an attempt before has left is touched."""
    _handle_stops(_interrupt)
    die_with_parent(int(os.environ["JOB_SUPERVISOR_PID"]))
    limit_s = float(os.environ.get("JOB_START_TIMEOUT_S", "inf"))
    start_beating(limit_s)
    for library in os.environ.get("JOB_WITHOUT", "").split():
        sys.modules[library] = None  # type: ignore[assignment]  # to whoever asks it is not installed
    _redirect_output(log_file)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the supervisor decides
    if os.environ.get("JOB_AHEAD"):
        _resolve(target)
        os.environ.update(json.load(sys.stdin))
        start_beating(limit_s)
    os.truncate(log_file, 0)


def _handle_stops(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, handler)


class _Stopped(BaseException):
    """Raised by the signal handler; no `except Exception` on the way may take it for an error of its own."""


def _interrupt(number: int, frame: Any) -> None:
    raise _Stopped


def _resolve(target: str) -> Any:
    """Import a stage. What that leaves in memory stays: to search it for garbage took a sixth of the time."""
    module, _, function = target.partition(":")
    gc.disable()
    stage = getattr(importlib.import_module(module), function)
    gc.freeze()
    gc.enable()
    return stage


def _redirect_output(log_file: Path) -> None:
    """Keep our own log on the terminal; everything else that is printed goes to the log file."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    handle = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    set_up_logging(terminal)


if __name__ == "__main__":
    _code = 1
    try:
        _code = main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
        for _stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # what nobody can read changes no exit code
                _stream.flush()
    finally:  # the outcome is written: no thread that still uploads may keep this process until it looks hung
        os._exit(_code)
