"""Attempts that race for one run, some of them stopped and continued as zombies: the commits are one linear chain."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from history import check_history, read_history

from job.store import RunStore

RACES = int(os.environ.get("RACES", "4"))
"""500 of each store at night."""
RACER = Path(__file__).parent / "racer.py"


class Racer:
    """A process that runs one attempt after another, as it is told on stdin."""

    def __init__(self, place: Path, number: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(RACER), str(place), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, store: str, run_id: str, seed: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([store, run_id, seed]) + "\n")
        self.process.stdin.flush()

    def end(self) -> str:
        """Return what the attempt came to."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_whoever_is_stopped_when_the_commits_are_one_linear_chain(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    base = str(tmp_path / "store") if kind == "folder" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    racers = [Racer(tmp_path, number) for number in range(3)]
    outcomes: dict[str, int] = {}
    try:
        for seed in range(RACES):
            for outcome in race(racers, base, f"run-{seed}", seed):
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
            check_history(read_history(tmp_path, f"run-{seed}"), RunStore(base, f"run-{seed}").objects)
    finally:
        for racer in racers:
            racer.close()
    assert set(outcomes) <= {"done", "Fenced"}, outcomes
    assert outcomes["done"] >= RACES, "the one that owned the run last finished each time"


def race(racers: list[Racer], base: str, run_id: str, seed: int) -> list[str]:
    """Let all begin at once; stop some at random moments, and continue them after others may have taken over."""
    rng = random.Random(seed)
    for racer in racers:
        racer.begin(base, run_id, rng.randrange(1 << 30))
    stopped = rng.sample(racers, rng.choice([1, 1, 2]))
    for racer in stopped:
        time.sleep(rng.uniform(0, 0.3))
        racer.process.send_signal(signal.SIGSTOP)
    time.sleep(rng.uniform(0.2, 1.0))
    for racer in stopped:
        racer.process.send_signal(signal.SIGCONT)
    return [racer.end() for racer in racers]


def good_history() -> list[dict[str, Any]]:
    return [
        {"attempt": "a", "epoch": 1, "pointer": {"epoch": 1, "manifest": None}, "etag": "1", "match": None},
        {"attempt": "a", "epoch": 1, "pointer": {"epoch": 1, "manifest": "m1"}, "etag": "2", "match": "1"},
        {"attempt": "b", "epoch": 2, "pointer": {"epoch": 2, "manifest": "m1"}, "etag": "3", "match": "2"},
        {"attempt": "b", "epoch": 2, "pointer": {"epoch": 2, "manifest": "m2"}, "etag": "4", "match": "3"},
    ]


def test_the_checker_accepts_a_chain_in_any_order_of_writing_down() -> None:
    history = good_history()
    random.Random(1).shuffle(history)
    check_history(history, None)


@pytest.mark.parametrize(
    ("at", "change"),
    [
        (3, {"match": "2"}),
        (3, {"epoch": 1, "pointer": {"epoch": 1, "manifest": "m9"}}),
        (2, {"match": None}),
        (2, {"etag": "2"}),
        (3, {"match": "lost"}),
    ],
)
def test_the_checker_rejects_forks_and_zombies(at: int, change: dict[str, Any]) -> None:
    history = good_history()
    history[at] |= change
    with pytest.raises(AssertionError):
        check_history(history, None)
