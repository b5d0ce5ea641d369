"""Node 0's side of a run on several nodes: who takes part, what they do together, how it ended.

    guest   hello    run, recipe, processes    who calls; who does not belong here is answered by a verdict
            ready    identity                  sources are fetched; a hash of model, data and tokenizer
            here     number                    the checkpoint of the order lies on this node
            left     number, code, reason, …   how this node's part of that order ended
    host    order    number, …                 the attempt and its checkpoint: everyone fetches
            start    port                      everyone starts its ranks
            verdict  code, reason              the end; 0 says that the training is committed

A line that closes or falls silent while ranks run is 79; before that, node 0 waits for the node to come again.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from job.errors import PERMANENT, JobError, PeerLost, RecipeError, ResourceExhausted
from job.launch.line import LAST_CALL_S, Line, Message
from job.launch.topology import Topology
from job.launch.verdict import Verdict

log = logging.getLogger("job.launch")

_INTRODUCTION_S = 10.0
"""How long a caller may take to say who it is."""
_POLL_S = 0.1
_FOLLOW_S = 5.0
"""How long the others may take to report after the ranks of this node failed."""


class Host:
    """Node 0's side; the others' part of a stage as its supervisor sees it (`supervisor.Peers`).

    Listens from the moment it is made until this process ends. `hello` is {run, recipe, processes}.
    """

    def __init__(self, topology: Topology, hello: Message, hang_timeout_s: float) -> None:
        self._topology, self._hello, self._hang_timeout_s = topology, hello, hang_timeout_s
        self._guests: dict[int, _Caller] = {}
        self._told: set[int] = set()
        self._came: set[int] = set()
        self._orders = 0
        self._verdict: Verdict | None = None
        self._misfit: JobError | None = None
        self._lock = threading.Lock()
        self._listener = _listen(topology.place.port)
        threading.Thread(target=self._answer, name="rendezvous", daemon=True).start()

    @property
    def own_address(self) -> str:
        """The address of this node that the others reach."""
        return next(iter(self._guests.values())).own_address

    def gather(self, identity: str, timeout_s: float, check: Callable[[], None]) -> None:
        """Wait until every node is ready; `check` may raise meanwhile.

        Raises PeerLost (79) when one does not come, or has fetched other sources than `identity`.
        """
        deadline = time.monotonic() + timeout_s
        if missing := self._find_missing():
            log.info("waiting for %d other node(s) at port %d", len(missing), self._topology.place.port)
        while missing := self._find_missing():
            check()
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"node(s) {', '.join(map(str, missing))} of {self._topology.nodes} did not join within "
                    f"{timeout_s / 60:g} min (launch.join_timeout_min); see their logs, then run again. (One that had "
                    "finished its part before is not started again by Kubernetes: create the Job anew, same run id)"
                )
            time.sleep(_POLL_S)
        for caller in self._callers():
            if caller.identity() != identity:
                raise PeerLost(
                    f"node {caller.rank} has fetched another model, data or tokenizer than node 0; give all nodes the "
                    "same files, and pin a revision that moves (model.revision, data.revision)"
                )

    def give(self, order: Message, timeout_s: float, check: Callable[[], None]) -> None:
        """Send the order of an attempt, and wait until its checkpoint lies on every node; raises as `check` does."""
        deadline = time.monotonic() + timeout_s
        self._orders += 1
        for caller in self._callers():
            caller.order = self._orders
            caller.line.send("order", **order | {"number": self._orders})
        while waiting := [caller.rank for caller in self._callers() if not caller.has("here")]:
            check()
            self.check()
            for verdict in self.verdicts():
                raise verdict.as_error()
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"node(s) {', '.join(map(str, waiting))} did not fetch the checkpoint within "
                    f"{timeout_s / 60:g} min (launch.join_timeout_min); see their logs"
                )
            time.sleep(_POLL_S)

    def start(self, port: int) -> None:
        """Have all nodes start their ranks, which meet at `port` of this node."""
        for caller in self._callers():
            caller.line.send("start", port=port)

    def check(self) -> None:
        """Raise PeerLost (79) where a node is gone without a word, or silent."""
        for caller in self._callers():
            problem = caller.line.find_trouble()
            if problem and caller.verdict() is None:
                raise PeerLost(f"node {caller.rank} of {self._topology.nodes} {problem}; see its log, then run again")

    def verdicts(self) -> list[Verdict]:
        """Return how the others' part of this attempt ended, as far as it has."""
        return [verdict for caller in self._callers() if (verdict := caller.verdict())]

    def wait_for_verdicts(self) -> list[Verdict]:
        """Return what the others report within a few seconds."""
        deadline = time.monotonic() + _FOLLOW_S
        while any(c.line.is_open and c.verdict() is None for c in self._callers()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return self.verdicts()

    def dismiss(self, verdict: Verdict) -> None:
        """Tell everyone how it ended, those included that call later; only the first verdict counts.

        What is wrong for good is every node's code, so it is worth a wait for those that have not called yet.
        """
        with self._lock:
            if self._verdict:
                return
            self._verdict = verdict
            self._told = set(self._guests)
            leaving = [threading.Thread(target=c.line.close, daemon=True) for c in self._callers()]
            for caller in self._callers():
                caller.line.send("verdict", code=verdict.code, reason=verdict.reason)
        for thread in leaving:
            thread.start()
        for thread in leaving:
            thread.join()
        deadline = time.monotonic() + (LAST_CALL_S if verdict.code in PERMANENT else 0)
        while len(self._told) < self._topology.nodes - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _callers(self) -> list[_Caller]:
        return [self._guests[rank] for rank in sorted(self._guests)]

    def _find_missing(self) -> list[int]:
        """Return the nodes that are not ready; one that has gone may come again, unless its trouble is permanent."""
        if self._misfit:
            raise self._misfit
        for caller in self._callers():
            verdict = caller.verdict()
            if verdict and verdict.code in PERMANENT:
                raise verdict.as_error()
            if problem := caller.line.find_trouble():  # else it waits here for the next try of a part that failed
                log.warning("node %d %s", caller.rank, f"has left: {verdict.reason}" if verdict else problem)
                del self._guests[caller.rank]
        ready = {caller.rank for caller in self._callers() if caller.identity()}
        return [rank for rank in range(1, self._topology.nodes) if rank not in ready]

    def is_awaited(self) -> bool:
        """Tell whether a node has never come; one that came and left, over and over, has trouble of its own."""
        return len(self._came) < self._topology.nodes - 1

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # too many strangers at once; they are sent away soon
                time.sleep(_POLL_S)
                continue
            threading.Thread(target=self._admit, args=(connection,), daemon=True).start()

    def _admit(self, connection: socket.socket) -> None:
        """Let a caller in that belongs to this run; anybody else hears why not, or nothing."""
        own_address = str(connection.getsockname()[0])
        line = Line(connection, self._hang_timeout_s)
        try:
            hello = line.received.get(timeout=_INTRODUCTION_S)
        except queue.Empty:
            return line.close()
        rank: Any = hello.get("rank")
        misfit = self._find_misfit(hello)
        with self._lock:
            known = None if misfit else self._guests.get(rank)  # a stranger's may be no number, nor anything to look up
            if known and known.line.is_open:
                misfit = PeerLost(f"there is a node {rank} already; two have the same number")
            if not misfit and not self._verdict:
                self._guests[rank] = _Caller(rank, line, own_address)
                self._came.add(rank)
                return log.info("node %d of %d has joined", rank, self._topology.nodes)
        verdict = self._verdict or Verdict.of(misfit or PeerLost("nobody waits for this node"))
        line.send("verdict", code=verdict.code, reason=verdict.reason)
        line.close()
        if self._verdict and not misfit:
            self._told.add(rank)
        return None

    def _find_misfit(self, hello: Message) -> JobError | None:
        """Return why a caller does not belong here; what is wrong with a node of this run ends the run."""
        rank, ours, place = hello.get("rank"), self._hello, self._topology.place
        if hello.get("run") != ours["run"] or type(rank) is not int or not 0 < rank < place.nodes:
            return PeerLost(f"another run's node 0 listens at port {place.port} of this host")
        if hello.get("recipe") != ours["recipe"]:
            self._misfit = RecipeError(f"node {rank} has another recipe than node 0; give every node the same")
        elif hello.get("processes") != ours["processes"]:
            self._misfit = ResourceExhausted(
                f"node {rank} would run {hello.get('processes')} ranks, node 0 {ours['processes']}: their numbers of "
                "GPUs differ; run on nodes that are alike, or set distributed.processes_per_node"
            )
        else:
            return None
        return self._misfit


class _Caller:
    """What node 0 knows of another node: what it said last of each kind."""

    def __init__(self, rank: int, line: Line, own_address: str) -> None:
        self.rank, self.line, self.own_address = rank, line, own_address
        self.order = 0
        """The number of the order that it was given last; what it says of an older one no longer counts."""
        self._said: dict[str, Message] = {}

    def has(self, kind: str) -> bool:
        """Tell whether the node has said so of its last order."""
        self._listen()
        return self._said.get(kind, {}).get("number") == self.order

    def identity(self) -> str:
        """Return the hash of what the node has fetched, "" before it is ready."""
        self._listen()
        return str(self._said.get("ready", {}).get("identity", ""))

    def verdict(self) -> Verdict | None:
        """Return how the node's part ended, None where it goes on."""
        return Verdict.parse(self._said["left"]) if self.has("left") else None

    def _listen(self) -> None:
        with suppress(queue.Empty):
            while True:
                message = self.line.received.get_nowait()
                self._said[str(message.get("kind"))] = message


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        raise PeerLost(
            f"port {port}, at which the nodes of this run meet, cannot be had ({error.strerror}): another process has "
            "it; run again, or set another JOB_RENDEZVOUS_PORT on every node"
        ) from None
