"""A store before which a cache stands answers reading with what was: every swap is lost, and none is tried for ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from job.errors import Unreachable
from job.recipe.schema import Store as Address
from job.store import Attempt, ModelPointer, RunStore
from job.store.folder import FolderStore
from job.store.manifest import Manifest, ManifestEntry
from job.store.objects import PreconditionFailed
from job.store.promotion import take_order
from job.store.records import Contention
from job.store.release import _write_manifest

ENTRY = ManifestEntry(1, "0" * 64, "file")


def own(store: str) -> Attempt:
    return Attempt(RunStore(store, "run-1"), 2.0, lambda: None)


def record(store: str) -> None:
    attempt = own(store)
    try:
        attempt.commit_record("train", {})
    finally:
        attempt.leave({"exit_code": 77, "reason": ""})


def promote(store: str) -> object:
    objects = FolderStore(Path(store) / "models" / "x")
    objects.write("v/file", b"1")
    objects.write("v/manifest.json", Manifest("release", {"file": ENTRY}, {"order": 1}).to_bytes())
    return ModelPointer(objects).promote("v")


CALLS: dict[str, tuple[str, Callable[[str], object]]] = {
    "lease": ("owner.json", own),
    "fence": ("current.json", own),
    "record": ("stages/train.json", record),
    "order": ("order/x.json", lambda store: take_order(Address(uri=store), "x")),
    "promotion": ("current.json", promote),
    "release": ("manifest.json", lambda store: _write_manifest(FolderStore(Path(store)), b"{}")),
}


@pytest.mark.parametrize(("key", "call"), CALLS.values(), ids=CALLS)
def test_a_swap_that_is_always_lost_is_77_after_some_tries(
    tmp_path: Path, key: str, call: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.store.records._CONTENDED_S", 0.3)
    write, tries = FolderStore.write, 0

    def lose(
        store: FolderStore, name: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        nonlocal tries
        if name != key or not (if_absent or if_match):
            return write(store, name, data, if_absent=if_absent, if_match=if_match)
        tries += 1
        raise PreconditionFailed("another writer was faster")

    monkeypatch.setattr(FolderStore, "write", lose)
    with pytest.raises(Unreachable, match="does a cache stand before the store"):
        call(str(tmp_path / "store"))
    assert 2 <= tries < 20


def test_swaps_that_are_lost_far_apart_are_no_contention(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("job.store.records.time.monotonic", lambda: now)
    monkeypatch.setattr("job.store.records.time.sleep", lambda _: None)
    contention = Contention("s3://x/models/m", "current.json")
    for _ in range(5):  # as where ten minutes of a comparison lie between
        contention.wait()
        now += 600
