"""One TCP connection between two supervisors of a run, with messages and a sign of life each way.

Messages are JSON objects, one per line, of at most 1 MiB; each has a `kind`. Nothing that comes is ever run.
"""

from __future__ import annotations

import ipaddress
import json
import queue
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import psutil

Message = dict[str, Any]

LAST_CALL_S = 20.0
"""How long whoever leaves for good waits for a node that has not called yet, so that it need not wait in vain."""

_LINE_BYTES = 1 << 20
_BEAT_S = 1.0
_DOUBT_S = 2.0
"""A silence is believed when it lasts so long after it was noticed: this process may have stood still itself."""
_LAST_WORDS_S = 5.0


class Line:
    """One connection: `received` holds what came, `is_open` tells whether more may come. Threads send and read."""

    def __init__(self, connection: socket.socket, silence_s: float) -> None:
        connection.settimeout(None)
        self.received: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.is_open = True
        self._connection, self._silence_s = connection, silence_s
        self._outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._heard, self._doubted = time.monotonic(), 0.0
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    def send(self, kind: str, **content: Any) -> None:
        """Send a message as soon as the other side takes it; one that is gone gets nothing and raises nothing."""
        self._outgoing.put(content | {"kind": kind})

    def close(self, patience_s: float = _LAST_WORDS_S) -> None:
        """Send what is waiting, then hang up."""
        self._outgoing.put(None)
        self._threads[1].join(patience_s)
        self._hang_up()

    def find_trouble(self) -> str:
        """Return what is wrong in words, "" where nothing is."""
        if not self.is_open:
            return "is gone without a word"
        return "has been silent for too long" if self._is_silent() else ""

    def _is_silent(self) -> bool:
        """Tell whether nothing has come for too long."""
        now = time.monotonic()
        if now - self._heard <= self._silence_s:
            self._doubted = 0.0
            return False
        self._doubted = self._doubted or now
        return now - self._doubted > _DOUBT_S

    def _read(self) -> None:
        try:
            with suppress(OSError, ValueError, RecursionError), self._connection.makefile("rb") as stream:
                while line := stream.readline(_LINE_BYTES):
                    message = json.loads(line)
                    self._heard = time.monotonic()
                    if not isinstance(message, dict):
                        return
                    if message.get("kind") != "beat":
                        self.received.put(message)
        finally:
            self.is_open = False

    def _write(self) -> None:
        with suppress(OSError):
            while True:
                try:
                    message = self._outgoing.get(timeout=_BEAT_S)
                except queue.Empty:
                    message = {"kind": "beat"}
                if message is None:
                    return
                self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _hang_up(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def find_free_port() -> int:
    """Return a port of this node that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def find_interface(address: str) -> str | None:
    """Return the network interface that has an address of this node; gloo would guess it from the host's name."""
    wanted = ipaddress.ip_address(address.removeprefix("::ffff:").partition("%")[0])
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            with suppress(ValueError):
                found = ipaddress.ip_address(entry.address.partition("%")[0])
                if found == wanted or (found.is_loopback and wanted.is_loopback):
                    return name
    return None
