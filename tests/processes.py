"""Processes of this machine, found by what stands on their command line."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def find_processes(word: str) -> list[int]:
    """Return the ids of the processes of this machine that have `word` on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # one that has ended meanwhile
            if word.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found
