"""How contenders are raced: turns forwards and backwards, the first round dropped, ratios with an interval of 95 %.

A turn is a call that says what it used. Contenders are commands, commands that are stopped at a marker, or workers:
processes that stay, so that only what is compared is measured, and not what Python imports.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from job.liveness import die_with_parent

HERE = Path(__file__).parent
_POLL_S = 0.002
_LIMIT_S = 600.0


@dataclass(frozen=True)
class Turn:
    """Processor seconds (of all threads and children), seconds of wall clock, and whatever else was measured."""

    cpu_s: float
    wall_s: float
    numbers: dict[str, Any] = field(default_factory=dict)


class Interval(NamedTuple):
    """A median and its bootstrap interval of 95 %."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.low:.2f} – {self.high:.2f})"


def race(contenders: Mapping[str, Callable[[], Turn]], rounds: int) -> dict[str, list[Turn]]:
    """Return every contender's turns but the first; odd rounds go backwards, so that a drift slows all alike."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            turns[name].append(contenders[name]())
    return {name: taken[1:] for name, taken in turns.items()}


def measure(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the median of values and its bootstrap interval (Efron 1979, 2,000 draws)."""
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).choice(values, size=(2000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return Interval(float(np.median(values)), float(low), float(high))


def compare(theirs: Sequence[float], ours: Sequence[float]) -> Interval:
    """Return the median ratio of paired rounds: above 1 where ours uses less."""
    return measure(np.asarray(theirs, dtype=np.float64) / np.maximum(np.asarray(ours, dtype=np.float64), 1e-9))


def run_command(words: Sequence[object], folder: Path, env: Mapping[str, str] | None = None, code: int = 0) -> Turn:
    """Run a command to its end, which must have this exit code; its last line on stdout may be a JSON object."""
    with (folder / "output.txt").open("w+b") as output, (folder / "log.txt").open("w+b") as log:
        began = time.perf_counter()
        process = subprocess.Popen([str(word) for word in words], stdout=output, stderr=log, env=_environment(env))
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0), log.seek(0)
        lines, errors = output.read().decode().splitlines(), log.read().decode()
    if process.returncode != code:
        raise RuntimeError(f"{process.args} ended with {process.returncode} instead of {code}:\n{errors[-3000:]}")
    numbers = {}
    with suppress(ValueError, IndexError):
        numbers = dict(json.loads(lines[-1]))
    return Turn(used.ru_utime + used.ru_stime, wall_s, numbers)


def run_until(marker: Path, words: Sequence[object], folder: Path, env: Mapping[str, str] | None = None) -> Turn:
    """Run a command until the file `marker` appears, note what its processes have used by then, and stop it."""
    marker.unlink(missing_ok=True)
    with (folder / "log.txt").open("wb") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in words], stdout=log, stderr=log, env=_environment(env), start_new_session=True
        )
        while not marker.exists():
            if process.poll() is not None or time.perf_counter() - began > _LIMIT_S:
                _stop(process)
                text = (folder / "log.txt").read_text()[-3000:]
                raise RuntimeError(f"{process.args}: no {marker.name} ({process.returncode}):\n{text}")
            time.sleep(_POLL_S)
        wall_s = time.perf_counter() - began
        cpu_s = _sum_cpu(psutil.Process(process.pid))
        _stop(process)
    return Turn(cpu_s, wall_s)


def _sum_cpu(process: psutil.Process) -> float:
    """Return processor seconds of a process, its children, and those that they have waited for."""
    seconds = 0.0
    for each in (process, *process.children(recursive=True)):
        try:
            seconds += sum(each.cpu_times()[:4])  # user, system, and both of children that ended
        except psutil.NoSuchProcess:
            pass
    return seconds


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Tell a command to stop, as a cluster does, so that it may commit what it has; then end what it has left."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1"} | dict(os.environ) | dict(env or {})


class Worker:
    """A process of a script in this folder that stays and takes a turn for every order that it is sent.

    It starts with its first turn, so that workers do not all fill the same cache at the same time.
    """

    def __init__(self, script: str, words: Sequence[object], folder: Path, env: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._command, self._log = [sys.executable, str(HERE / script), *map(str, words)], folder / "log.txt"
        self._env = _environment(env)
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=self._env, text=True
            )

    def take_turn(self) -> Turn:
        """Return what the worker measured."""
        self._process = self._process or self._start()
        assert self._process.stdin and self._process.stdout
        print("turn", file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._command} died:\n{self._log.read_text()[-3000:]}")
        return Turn(**json.loads(answer))

    def close(self) -> None:
        """Let the worker end."""
        if self._process and self._process.stdin:
            self._process.stdin.close()
            self._process.wait(60)


def serve_turns(take_turn: Callable[[], Turn]) -> None:
    """A worker's side: take a turn for every line on stdin until it is closed; what libraries print goes to stderr."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for _ in sys.stdin:
        turn = take_turn()
        answers.write(json.dumps({"cpu_s": turn.cpu_s, "wall_s": turn.wall_s, "numbers": turn.numbers}) + "\n")
        answers.flush()
