"""Starting a group of processes, watching it, and deciding its exit code.

torchrun, `accelerate launch` and the deepspeed launcher turn every exit code into 1; here each
process leaves an outcome file, and the first that failed decides. No process outlives its group, a
stopped or hanging one ends it (`pulse.py`), and so does the memory of the node (`memory.py`).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from job.errors import Interrupted, PeerLost
from job.launch.memory import MemoryWatch
from job.launch.pulse import Pulse
from job.launch.signals import StopRequest
from job.launch.surroundings import inherit
from job.launch.verdict import Verdict, decide
from job.processor import limit_threads

if TYPE_CHECKING:
    from job.recipe.schema import Launch  # to build its classes takes time that most verbs have not

log = logging.getLogger("job.launch")

_CHECKOUT = "" if __file__.startswith(sysconfig.get_path("purelib")) else str(Path(__file__).parents[2])
"""Where this package lies when it is not installed; a process that is started is to find the same one."""
_POLL_S = 0.05
_PEERS_FOLLOW_S = 5.0
"""How long the others may take to report after one process failed, before they are killed."""
_DYING_S = 30.0
"""How long those that were killed may take to end."""
_OWN_SLEEP_S = 2.0
"""A longer pause between two looks at the group is no load but a SIGSTOP or a suspended machine."""
_SHORTENED_S = 5.0
"""What is left of the grace after a second stop signal."""
_ASKED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Limits:
    """Seconds: from a stop signal to being killed, without a sign of life, until the first sign of life."""

    grace_s: float
    hang_timeout_s: float
    start_timeout_s: float

    @staticmethod
    def of(launch: Launch) -> Limits:
        """Return the limits that a recipe sets."""
        return Limits(launch.grace_s, launch.hang_timeout_s, 60.0 * launch.join_timeout_min)


class Peers(Protocol):
    """The same stage on the run's other nodes, as this one's supervisor sees it (`host.py`, `guest.py`)."""

    def check(self) -> None:
        """Raise where one of them is lost."""

    def verdicts(self) -> list[Verdict]:
        """Return how their part has ended, as far as it has."""

    def wait_for_verdicts(self) -> list[Verdict]:
        """The same after this node's part has failed: theirs may say why."""


class Alone:
    """No other node takes part."""

    def check(self) -> None:
        """Nobody can be lost."""

    def verdicts(self) -> list[Verdict]:
        """Nobody says anything."""
        return []

    wait_for_verdicts = verdicts


ALONE = Alone()


class Supervisor:
    """Runs stages in processes of their own and passes stop signals on to them.

    `check` is called all the while; what it raises ends the group and reaches the caller.
    """

    def __init__(self, stop: StopRequest, limits: Limits, check: Callable[[], None] = lambda: None) -> None:
        self._stop, self._limits, self._check = stop, limits, check
        self._memory = MemoryWatch()
        self._ahead: dict[Path, subprocess.Popen[bytes]] = {}

    def start_ahead(self, target: str, folder: Path, environments: Iterable[Mapping[str, str]]) -> None:
        """Start processes that import `target` and wait until `run` is called with it, or `drop_ahead`.

        What libraries read while they are imported must stand in `environments`; `run` may set what is read later.
        """
        for index, variables in enumerate(environments):
            outcome = _find_outcome(target, folder, index)
            self._ahead[outcome] = _start_process(target, folder, outcome, variables, ahead=True)

    def drop_ahead(self) -> None:
        """Kill what was started ahead and is not needed."""
        _kill_sessions(self._ahead.values())
        self._ahead.clear()

    def run(
        self, target: str, folder: Path, environments: Iterable[Mapping[str, str]] = ({},), peers: Peers = ALONE
    ) -> Verdict:
        """Run `target` ("module:function") once per environment; return when all have left.

        `folder` is the run's folder, which the function gets and where outcomes are written. The verdict is that of
        this node's processes and of `peers`.
        """
        if self._stop.count:
            return Verdict(Interrupted.exit_code, f"{self._stop.name} before {target} began", {})
        group: list[_Member] = []
        watch = _Watch(group, self._limits, self._stop, peers)
        try:
            for index, variables in enumerate(environments):
                group.append(self._start(target, folder, index, variables))
            while watch.goes_on():
                time.sleep(_POLL_S)
                self._check()
                peers.check()
                self._stop.apply_deadline(_read_saving_s(folder))
        finally:
            _kill_sessions([member.process for member in group])
        own = watch.ended_by or decide([self._judge(member, len(group), watch) for member in group])
        if not own.code:
            return own
        others = peers.wait_for_verdicts()
        # of two that weigh the same the first counts: what was killed because a peer had left explains nothing
        return decide([*others, own] if watch.followed_peers else [own, *others])

    def _start(self, target: str, folder: Path, index: int, environment: Mapping[str, str]) -> _Member:
        outcome = _find_outcome(target, folder, index)
        outcome.unlink(missing_ok=True)
        process = self._release(outcome, environment) or _start_process(target, folder, outcome, environment)
        pulse = Pulse(process.pid, _find_heartbeat(outcome), self._limits.hang_timeout_s, self._limits.start_timeout_s)
        return _Member(index, process, outcome, pulse)

    def _release(self, outcome: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
        """Let a process go that was started ahead; None where there is none, or it has died meanwhile."""
        process = self._ahead.pop(outcome, None)
        if process is None:
            return None
        assert process.stdin
        try:
            with process.stdin as pipe:
                pipe.write(json.dumps(dict(environment)).encode())
            return process
        except OSError:  # nobody reads from the pipe of one that has died
            _kill_sessions([process])
        log.warning("a process that waited has ended (%s); another takes its place", process.returncode)
        self._memory = MemoryWatch()  # if it was killed for memory, that says nothing of the next
        return None

    def _judge(self, member: _Member, size: int, watch: _Watch) -> Verdict:
        if outcome := _read_json(member.outcome):
            return Verdict.parse(outcome)
        code = member.process.returncode
        if code is None and not watch.was_told:
            reason = f"process {member.index} of {size} was killed and does not end; {member.pulse.describe_state()}"
            return Verdict(PeerLost.exit_code, f"{reason}, see dmesg", {})
        if code is None or -code in _ASKED or (code == -signal.SIGKILL and watch.was_told):
            return Verdict(Interrupted.exit_code, f"{watch.why_told}; the last committed checkpoint stays", {})
        if code == -signal.SIGKILL and (shortage := self._memory.explain_kill()):
            return Verdict(shortage.exit_code, str(shortage), {})
        return _explain_silence(code, member.index, size)


@dataclass
class _Member:
    """One process of a group, where it leaves its outcome, and its sign of life."""

    index: int
    process: subprocess.Popen[bytes]
    outcome: Path
    pulse: Pulse


class _Watch:
    """When a group must be told to stop, or may be waited for no longer."""

    def __init__(self, group: list[_Member], limits: Limits, stop: StopRequest, peers: Peers) -> None:
        self._group, self._limits, self._stop, self._peers = group, limits, stop, peers
        self._heard, self._deadline = 0, float("inf")
        self._polled = time.monotonic()
        self.was_told, self.why_told = False, "a process was told to stop"
        self.followed_peers = False
        self.ended_by: Verdict | None = None

    def goes_on(self) -> bool:
        """Pass signals on; tell whether there is anything left to wait for."""
        running = [member for member in self._group if member.process.poll() is None]
        if not running:
            return False
        self._forgive_own_sleep(running)
        if self._stop.count > self._heard:
            self._pass_on(running)
        self._follow(running)
        if time.monotonic() > self._deadline:
            return False
        return not self._is_hanging(running)

    def _forgive_own_sleep(self, running: list[_Member]) -> None:
        """Whoever was stopped himself has not seen the others' signs of life meanwhile."""
        slept_s, self._polled = time.monotonic() - self._polled, time.monotonic()
        if slept_s > _OWN_SLEEP_S:
            log.warning("this process stood still for %.0f s; that does not count against the others", slept_s)
            for member in running:
                member.pulse.forgive(slept_s)

    def _pass_on(self, running: list[_Member]) -> None:
        first, self._heard = not self._heard, self._stop.count
        left_s = self._limits.grace_s if first and self._heard == 1 else _SHORTENED_S
        log.info("%s: asking %d process(es) to stop within %.0f s", self._stop.name, len(running), left_s)
        self._tell(running, f"{self._stop.name}, not finished within {left_s:.0f} s", left_s)

    def _follow(self, running: list[_Member]) -> None:
        """When one has left otherwise than well, the others follow: asked to stop if it was, else killed soon."""
        left = [verdict for verdict in self._peers.verdicts() if verdict.code]
        codes = [member.process.returncode for member in self._group if member.process.returncode]
        self.followed_peers = self.followed_peers or bool(left and not codes)
        codes += [verdict.code for verdict in left]
        if not codes:
            return
        if all(code == Interrupted.exit_code or -code in _ASKED for code in codes):
            if not self.was_told:
                # told again, those who agreed to stop and still upload would leave at once
                agreed = any(_read_json(member.outcome).get("together") for member in self._group)
                agreed = agreed or any(verdict.together for verdict in left)
                self._tell([] if agreed else running, "a peer was told to stop", self._limits.grace_s)
        elif not self.was_told:
            self._deadline = min(self._deadline, time.monotonic() + _PEERS_FOLLOW_S)

    def _tell(self, running: list[_Member], why: str, left_s: float) -> None:
        self.was_told, self.why_told = True, why
        self._deadline = min(self._deadline, time.monotonic() + left_s)
        for member in running:
            member.process.send_signal(signal.SIGTERM)

    def _is_hanging(self, running: list[_Member]) -> bool:
        """Tell whether a process shows no sign of life; the one that is stopped or fell silent first is named."""
        silent = [member for member in running if member.pulse.is_over()]
        if not silent:
            return False
        culprit = max(running, key=lambda member: (member.pulse.is_stopped(), member.pulse.silence_s()))
        self.ended_by = Verdict(
            PeerLost.exit_code,
            f"process {culprit.index} of {len(self._group)} has shown no sign of life for "
            f"{culprit.pulse.silence_s():.0f} s ({culprit.pulse.describe_state()}); launch.hang_timeout_s is "
            f"{self._limits.hang_timeout_s:.0f}; see its log in the run's logs folder",
            {},
        )
        return True


def _start_process(
    target: str, folder: Path, outcome: Path, environment: Mapping[str, str], *, ahead: bool = False
) -> subprocess.Popen[bytes]:
    heartbeat = _find_heartbeat(outcome)
    heartbeat.unlink(missing_ok=True)
    heartbeat.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "job.launch.worker", target, str(folder), str(outcome)]
    own = {
        "JOB_HEARTBEAT": str(heartbeat),
        "JOB_SUPERVISOR_PID": str(os.getpid()),
        "JOB_AHEAD": "1" if ahead else "",
        # else `-m` looks for libraries where job is called first: a job.py or queue.py there would be run
        "PYTHONSAFEPATH": "1",
    }
    variables = {**inherit(os.environ), **environment, **own}
    if threads := limit_threads():
        variables.setdefault("OMP_NUM_THREADS", str(threads))
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [variables.get("PYTHONPATH"), _CHECKOUT]))
    stdin = subprocess.PIPE if ahead else subprocess.DEVNULL
    return subprocess.Popen(command, env=variables, start_new_session=True, stdin=stdin)


def _kill_sessions(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """Kill the processes that are left, and whatever they started: each leads a session of its own.

    All are killed before the first is waited for, and none is for ever: one that waits for a disk or a driver (state D)
    ends when that answers.
    """
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + _DYING_S
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("process %d was killed %.0f s ago and does not end; nobody waits for it", process.pid, _DYING_S)
        if process.stdin:
            with suppress(OSError):
                process.stdin.close()


def _find_outcome(target: str, folder: Path, index: int) -> Path:
    return folder / "outcomes" / f"{target.rpartition(':')[2]}-{index}.json"


def _find_heartbeat(outcome: Path) -> Path:
    return outcome.parents[1] / "heartbeats" / outcome.stem


def _explain_silence(code: int, index: int, size: int) -> Verdict:
    """A process without an outcome was killed or crashed: name the signal."""
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL:
        reason = f"process {index} of {size} was killed (SIGKILL); too little memory is the usual cause, see dmesg"
        return Verdict(PeerLost.exit_code, reason, {})
    return Verdict(1, f"process {index} of {size} crashed with {name}; see the logs folder of the run", {})


def _read_saving_s(folder: Path) -> float:
    """Return how long the last checkpoint took from snapshot to commit, 0 before the first."""
    seconds = _read_json(folder / "reserve.json").get("seconds", 0.0)
    return float(seconds) if isinstance(seconds, (int, float)) else 0.0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
