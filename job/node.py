"""What one node has for its part of a run: processes for stages, and calls to the store that a stop signal ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import wait
from dataclasses import replace
from typing import Any, TypeVar

from job.errors import Interrupted, Unreachable
from job.launch import ALONE, Limits, Peers, StopRequest, Supervisor
from job.recipe import Run
from job.recipe.schema import Launch
from job.store.parallel import run_beside

T = TypeVar("T")

_POLL_S = 0.1
_LEAVING_S = 20.0
"""Whoever stopped this attempt will not wait for a store that is out: the result line comes after so long at most."""
_LEAVING_SHARE = 0.25
"""Of the grace, for saying goodbye to the store; the rest is the ranks'."""
_GIVE_UP_S = 1.0
"""How long a call to the store may still take after a stop signal; most end well before."""


class Node:
    """`leaving_s` see above. `check` is asked all the while something goes on here; what it raises ends that.

    Whoever tells the story sets it: at first there is nothing to ask for.
    """

    def __init__(self, launch: Launch, stop: StopRequest) -> None:
        self.check: Callable[[], None] = lambda: None
        limits = Limits.of(launch)
        self.stop, self.leaving_s = stop, min(_LEAVING_S, _LEAVING_SHARE * limits.grace_s)
        limits = replace(limits, grace_s=limits.grace_s - self.leaving_s)
        self._supervisor = Supervisor(stop, limits, lambda: self.check())

    def run_process(
        self, target: str, run: Run, environment: Mapping[str, str], peers: Peers = ALONE
    ) -> dict[str, Any]:
        """Run a stage's function in a process of its own; return its record or raise the error that it reports."""
        return self.run_processes(target, run, [environment], peers)

    def run_processes(
        self, target: str, run: Run, environments: Iterable[Mapping[str, str]], peers: Peers = ALONE
    ) -> dict[str, Any]:
        """Run a stage's function in one process per environment; return the first one's record or raise."""
        verdict = self._supervisor.run(target, run.folder, environments, peers)
        if verdict.code:
            raise verdict.as_error()
        return verdict.record

    def start_ahead(self, target: str, run: Run, environments: Iterable[Mapping[str, str]]) -> None:
        """Start the processes of a stage that comes soon: what it imports is there when `run_processes` is called."""
        self._supervisor.start_ahead(target, run.folder, environments)

    def drop_ahead(self) -> None:
        """End what was started ahead and is not needed."""
        self._supervisor.drop_ahead()

    def check_stop(self, when: str) -> None:
        """Raise Interrupted (75) where a stop signal came `when`, in words."""
        if self.stop.count:
            raise Interrupted(f"{self.stop.name} {when}")

    def transfer(self, work: Callable[[], T], check: Callable[[], None] = lambda: None) -> T:
        """Ask the store in a thread, so that a stop signal or a lost lease waits neither for gigabytes nor an outage.

        `check` may raise meanwhile. What is given up ends with this process, which leaves without waiting for threads.
        """
        done = run_beside("transfer", work)
        while not wait([done], timeout=_POLL_S).done:
            self.check()
            check()
            if self.stop.count and not wait([done], timeout=_GIVE_UP_S).done:
                self.check_stop("during a transfer; run again to go on from what is committed")
        if isinstance(done.exception(), Unreachable):
            self.check_stop("while the store was out; run again to go on from what is committed")
        return done.result()
