"""Small JSON objects: how they are written, sealed, read, and swapped.

A record that decides something carries `nonce` (so that one's own write is known again when its
answer was lost) or `seal` (so that a flipped bit is known as damage).
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from job.errors import NoValidCheckpoint, Unreachable
from job.store.objects import Blob, PreconditionFailed, Store

Record = dict[str, Any]
Found = TypeVar("Found")

_CONTENDED_S = 60.0
"""Whoever loses a swap reads what has won, and then it is his turn: seconds, were there hundreds of them."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0
_APART_S = 10.0
"""Losses that lie so far apart have nothing to do with each other: something else was done in between."""


def new_nonce() -> str:
    """Return 32 random hex digits."""
    return uuid.uuid4().hex


def dump(value: Record) -> bytes:
    """Return the bytes that are stored: sorted, indented, one newline at the end."""
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def parse(blob: Blob, where: str) -> Record:
    """Return the JSON object in `blob`; raise NoValidCheckpoint (17) naming `where` when it is damaged."""
    try:
        value = json.loads(blob.data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise NoValidCheckpoint(f"{where}: not a JSON object (damaged); restore it or start with --fresh")
    return value


def read_record(objects: Store, key: str) -> Record | None:
    """Return the JSON object that lies at `key`, None where nothing does; NoValidCheckpoint (17) when it is damaged."""

    def read() -> Record | None:
        blob = objects.read(key)
        return None if blob is None else parse(blob, f"{objects.uri}/{key}")

    return read_again(read)


def read_again(read: Callable[[], Found]) -> Found:
    """Return what `read` does; what comes damaged (17) is read once more: on the way, perhaps. At rest it stays so."""
    try:
        return read()
    except NoValidCheckpoint:
        return read()


def parse_leniently(blob: Blob | None) -> Record:
    """Return the record; what is no record counts as none, and an epoch that is no number as 0."""
    try:
        record = parse(blob, "") if blob else {}
    except NoValidCheckpoint:
        record = {}
    return record if type(record.get("epoch", 0)) is int else record | {"epoch": 0}


def dig(value: Any, *keys: str) -> Any:
    """Return what lies below `keys`, None where nothing does."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def seal(value: Record) -> Record:
    """Return `value` with `seal`: the sha256 (hex) over everything else in it."""
    plain = {key: inner for key, inner in value.items() if key != "seal"}
    return plain | {"seal": hashlib.sha256(dump(plain)).hexdigest()}


def dump_sealed(value: Record) -> bytes:
    """Return `dump(seal(value))`, but written once; "seal" must be the last of its keys."""
    plain = dump(value)
    return plain.removesuffix(b"\n}\n") + f',\n "seal": "{hashlib.sha256(plain).hexdigest()}"\n}}\n'.encode()


def has_seal(value: Record) -> bool:
    """Tell whether `value` is as it was when it was sealed."""
    try:
        return "seal" in value and seal(value)["seal"] == value["seal"]
    except RecursionError:  # nested deeper than can be written, though it can be read
        return False


def swap(objects: Store, key: str, value: Record, etag: str | None) -> str:
    """Write `value` where the object still has `etag` (None: where there is none); return the new ETag.

    Raises PreconditionFailed when somebody else's object is there. A 412 that answers one's own write
    (the client repeated a request whose answer was lost) is recognised by what lies there: `value`, nonce and all.
    """
    try:
        return objects.write(key, dump(value), if_absent=etag is None, if_match=etag)
    except PreconditionFailed:
        found = objects.read(key)
        if found and found.data == dump(value):
            return found.etag
        raise


class Contention:
    """Bounds how long and how often a swap of `key` is tried again that others are faster with.

    Where 412 answers what was read a moment ago, over and over, reading answers with something old: a cache that stands
    before the store, which its probe cannot tell from a store that has none.
    """

    def __init__(self, uri: str, key: str) -> None:
        self._where, self._last = f"{uri}/{key}", -_APART_S

    def wait(self) -> None:
        """Pause after a swap that was lost; Unreachable (77) where nothing else happened for a minute."""
        now = time.monotonic()
        if now - self._last > _APART_S:
            self._deadline, self._pause_s = now + _CONTENDED_S, _SHORTEST_PAUSE_S
        if now > self._deadline:
            raise Unreachable(
                f"{self._where}: was never what had just been read, for {_CONTENDED_S:.0f} s; does a cache stand "
                "before the store? Take it away, then run again"
            )
        time.sleep(self._pause_s)
        self._pause_s, self._last = min(2 * self._pause_s, _LONGEST_PAUSE_S), time.monotonic()
