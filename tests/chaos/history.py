"""What attempts did to a run's current.json, written down by each of them, and whether it is one linear chain."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from job.store import Store
from job.store.commit import read_pointer
from job.store.restore import fetch_checkpoint

Swap = dict[str, Any]
"""One successful swap: attempt, epoch, pointer (as written), etag (of it), match (the ETag that it replaced)."""


def read_history(place: Path, run_id: str) -> list[Swap]:
    """Return the swaps that all racers wrote down for this run."""
    lines = [line for path in place.glob(f"{run_id}-*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def check_history(history: Iterable[Swap], objects: Store | None) -> None:
    """Assert one linear chain of swaps with epochs that never fall; with `objects`, that its end is there and whole."""
    swaps = list(history)
    assert swaps, "nothing was committed at all"
    followers = Counter(swap["match"] for swap in swaps)
    forks = {match: count for match, count in followers.items() if count > 1}
    assert not forks, f"two writers replaced the same pointer: {forks}"
    by_match = {swap["match"]: swap for swap in swaps}
    chain, etag = [], None
    while etag in by_match:
        swap = by_match.pop(etag)
        chain.append(swap)
        etag = swap["etag"]
    assert not by_match, f"swaps that hang on no other: {list(by_match.values())}"
    epochs = [swap["pointer"]["epoch"] for swap in chain]
    assert epochs == sorted(epochs), f"an older attempt wrote after a newer one: {epochs}"
    assert all(swap["epoch"] == swap["pointer"]["epoch"] for swap in chain)
    if objects is not None:
        check_end(chain[-1], objects)


def check_end(last: Swap, objects: Store) -> None:
    """Assert that the store holds what the last swap wrote, and that it can be fetched and verified."""
    pointer = read_pointer(objects)
    assert pointer == last["pointer"]
    with tempfile.TemporaryDirectory() as folder:
        fetch_checkpoint(objects, pointer["manifest"], pointer["manifest_sha256"], Path(folder))
