"""Starting a group of processes, watching it, and deciding its exit code.

torchrun, `accelerate launch` and the deepspeed launcher turn every exit code into 1; here each
process leaves an outcome file, and the first that failed decides. No process outlives its group.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import PERMANENT, Interrupted, PeerLost
from job.launch.signals import StopRequest

log = logging.getLogger("job.launch")

_POLL_S = 0.05
_PEERS_FOLLOW_S = 5.0
"""How long the others may take to report after one process failed, before they are killed."""


@dataclass(frozen=True)
class Verdict:
    """Exit code and reason of a group; `record` is what its first process returned."""

    code: int
    reason: str
    record: dict[str, Any]


class Supervisor:
    """Runs stages in processes of their own and passes stop signals on to them."""

    def __init__(self, stop: StopRequest, grace_s: float) -> None:
        self._stop, self._grace_s = stop, grace_s

    def run(self, target: str, folder: Path, environments: Iterable[Mapping[str, str]] = ({},)) -> Verdict:
        """Run `target` ("module:function") once per environment; return when all have left.

        `folder` is the run's folder, which the function gets and where outcomes are written.
        """
        if self._stop.count:
            return Verdict(Interrupted.exit_code, f"{self._stop.name} before {target} began", {})
        outcomes = []
        group: list[subprocess.Popen[bytes]] = []
        for index, environment in enumerate(environments):
            outcome = folder / "outcomes" / f"{target.rpartition(':')[2]}-{index}.json"
            outcome.unlink(missing_ok=True)
            outcomes.append(outcome)
            command = [sys.executable, "-m", "job.launch.worker", target, str(folder), str(outcome)]
            group.append(subprocess.Popen(command, env=os.environ | environment, start_new_session=True))
        try:
            self._watch(group)
        finally:
            _kill(group)
        return _decide(group, [_read_outcome(path) for path in outcomes])

    def _watch(self, group: list[subprocess.Popen[bytes]]) -> None:
        """Return when every process has left, or must be killed because a peer failed or grace is over."""
        passed_on, deadline = 0, float("inf")
        while any(process.poll() is None for process in group):
            if self._stop.count > passed_on:
                if not passed_on:
                    log.info(
                        "%s: asking %d process(es) to stop within %.0f s", self._stop.name, len(group), self._grace_s
                    )
                    deadline = min(deadline, time.monotonic() + self._grace_s)
                passed_on = self._stop.count
                _signal(group, signal.SIGTERM)
            if any(process.poll() for process in group):
                deadline = min(deadline, time.monotonic() + (self._grace_s if passed_on else _PEERS_FOLLOW_S))
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_S)


def _decide(group: list[subprocess.Popen[bytes]], outcomes: list[dict[str, Any]]) -> Verdict:
    """The first permanent failure decides, then any other failure, a lost peer last."""
    verdicts = [
        Verdict(outcome["code"], outcome["reason"], outcome.get("record") or {})
        if outcome
        else _explain_silence(process.returncode, index, len(group))
        for index, (process, outcome) in enumerate(zip(group, outcomes, strict=True))
    ]
    failed = [verdict for verdict in verdicts if verdict.code]
    if not failed:
        return verdicts[0]
    return min(failed, key=lambda verdict: (verdict.code not in PERMANENT, verdict.code == PeerLost.exit_code))


def _explain_silence(code: int, index: int, size: int) -> Verdict:
    """A process without an outcome was killed or crashed: name the signal."""
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL:
        reason = f"process {index} of {size} was killed (SIGKILL); too little memory is the usual cause, see dmesg"
        return Verdict(PeerLost.exit_code, reason, {})
    return Verdict(1, f"process {index} of {size} crashed with {name}; see the logs folder of the run", {})


def _read_outcome(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _signal(group: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in group:
        if process.poll() is None:
            process.send_signal(number)


def _kill(group: list[subprocess.Popen[bytes]]) -> None:
    """Kill each process that is left, and whatever any of them started: each leads a session of its own."""
    for process in group:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
