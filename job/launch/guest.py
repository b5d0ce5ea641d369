"""The side of every node but the first; what is said on the line stands in `host.py`."""

from __future__ import annotations

import queue
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from job.errors import PERMANENT, PeerLost
from job.launch.line import LAST_CALL_S, Line, Message
from job.launch.topology import Place
from job.launch.verdict import Verdict

_CALL_S = 10.0
"""How long one attempt to reach node 0 may take."""
_PAUSE_S = 0.5


class Guest:
    """The side of every other node; node 0 as its supervisor sees it (`supervisor.Peers`).

    Calls node 0 from the moment it is made, for at most `join_timeout_s`; the name may not exist yet.
    """

    def __init__(self, place: Place, hello: Message, join_timeout_s: float, hang_timeout_s: float) -> None:
        self._place, self._hello = place, hello | {"rank": place.node_rank}
        self._join_timeout_s, self._hang_timeout_s = join_timeout_s, hang_timeout_s
        self._deadline, self._trouble = time.monotonic() + join_timeout_s, "was not called yet"
        self._line: Line | None = None
        self._next: list[Message] = []
        self.own_address = ""
        threading.Thread(target=self._call, name="rendezvous", daemon=True).start()

    @property
    def has_joined(self) -> bool:
        """Tell whether node 0 was reached."""
        return self._line is not None

    def say(self, kind: str, **content: Any) -> None:
        """Send a message; nothing where node 0 was not reached yet."""
        if self._line:
            self._line.send(kind, **content)

    def hear(self) -> Message | None:
        """Return the next message of node 0, None where there is none yet; raises as `check` does."""
        self.check()
        return self._next.pop(0) if self._next else None

    def put_back(self, message: Message) -> None:
        """Have `hear` return a message once more."""
        self._next.insert(0, message)

    def check(self) -> None:
        """Raise PeerLost (79) when node 0 was not reached in time, is gone without a word, or silent."""
        if self._line is None:
            if time.monotonic() > self._deadline:
                raise PeerLost(
                    f"node 0 ({self._place.host}:{self._place.port}) {self._trouble}, tried for "
                    f"{self._join_timeout_s / 60:g} min (launch.join_timeout_min); see its log, then run again"
                )
            return
        problem = self._line.find_trouble()
        with suppress(queue.Empty):
            while True:
                self._next.append(self._line.received.get_nowait())
        if problem and not self._next:
            raise PeerLost(f"node 0 ({self._place.host}) {problem}; see its log, then run again")

    def verdicts(self) -> list[Verdict]:
        """Return what ends this node's part of an attempt: a verdict, or node 0's order for the next one."""
        if not self._next:
            return []
        if self._next[0].get("kind") == "verdict":
            return [Verdict.parse(self._next[0])]
        return [Verdict(PeerLost.exit_code, "node 0 begins another attempt", {})]

    wait_for_verdicts = verdicts

    def leave(self, number: int, verdict: Verdict) -> None:
        """Say how this node's part, the `number`-th order's, ended, and hang up.

        What is wrong for good is node 0's code too, so it is worth a wait where node 0 is not there yet.
        """
        deadline = time.monotonic() + (LAST_CALL_S if verdict.code in PERMANENT else 0)
        while self._line is None and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
        if self._line:
            self._line.send("left", number=number, **verdict.describe())
            self._line.close()

    def _call(self) -> None:
        while time.monotonic() < self._deadline:
            try:
                connection = socket.create_connection((self._place.host, self._place.port), timeout=_CALL_S)
            except OSError as error:  # no such name yet, or nobody listens yet
                self._trouble = f"was not reached ({error.strerror or error})"
                time.sleep(_PAUSE_S)
                continue
            self.own_address = str(connection.getsockname()[0])
            line = Line(connection, self._hang_timeout_s)
            line.send("hello", **self._hello)
            self._line = line
            return
