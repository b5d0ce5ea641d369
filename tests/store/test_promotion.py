"""The pointer of a model: promotion by hand and by order, rollback, and what two at once leave."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from job.errors import CheckpointMismatch, Fenced, NotFound, NoValidCheckpoint, SecurityRefused
from job.recipe.schema import Store as Address
from job.store import ModelPointer, Store, latest_release, open_store
from job.store.manifest import Manifest, ManifestEntry
from job.store.objects import Blob
from job.store.promotion import take_order


@pytest.fixture
def pointer(store_uri: str) -> ModelPointer:
    """The pointer of a model with the releases a, b and c."""
    objects = open_store(f"{store_uri}/models/tiny")
    for version in "abc":
        entry = {"config.json": ManifestEntry(2, "0" * 64, "config.json")}
        objects.write(f"{version}/config.json", b"{}")
        objects.write(f"{version}/manifest.json", Manifest("release", entry).to_bytes())
    return ModelPointer(objects)


def test_a_rollback_goes_back_to_what_was_current_before_step_by_step(pointer: ModelPointer, store_uri: str) -> None:
    for version in "abc":
        pointer.promote(version)
    assert [pointer.rollback().version for _ in range(2)] == ["b", "a"]
    assert latest_release(f"{store_uri}/models/tiny").endswith("/a")
    with pytest.raises(NotFound, match="no version was current before"):
        pointer.rollback()
    assert pointer.promote("c").before == ["a"], "and from there a rollback leads back again"
    assert pointer.rollback().version == "a"


def test_promoting_the_current_release_again_changes_no_history(pointer: ModelPointer) -> None:
    for version in "abb":
        pointer.promote(version)
    assert pointer.rollback().version == "a"


def test_a_release_of_which_a_file_is_gone_is_not_made_current(pointer: ModelPointer, store_uri: str) -> None:
    for version in "ab":
        pointer.promote(version)
    open_store(store_uri).delete(["models/tiny/a/config.json"])
    for call in (lambda: pointer.promote("a"), pointer.rollback):
        with pytest.raises(NotFound, match=r"a/config\.json: is gone \(1 of 1 files\)"):
            call()
    assert pointer.read().version == "b"


@pytest.mark.parametrize("version", ["d", "a/config.json", "..", "../tiny/a"])
def test_only_a_release_can_be_promoted(pointer: ModelPointer, version: str) -> None:
    pointer.promote("a")
    with pytest.raises((NotFound, SecurityRefused)):
        pointer.promote(version)
    assert pointer.read().version == "a"


def test_a_pointer_that_was_moved_meanwhile_is_left_alone(
    pointer: ModelPointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointer.promote("a")
    pointer.promote("b")
    seen = pointer.read()
    pointer.promote("c")
    assert pointer.move(seen, "a", 1, {}) is False
    monkeypatch.setattr(pointer, "read", lambda: seen)
    with pytest.raises(Fenced, match="moved meanwhile"):
        pointer.rollback()
    monkeypatch.undo()
    assert pointer.read().version == "c"


def test_every_run_gets_a_number_of_its_own_and_later_ones_higher_ones(store_uri: str) -> None:
    def take() -> int:
        return take_order(Address(uri=store_uri), "tiny")

    first = take()
    with ThreadPoolExecutor(4) as pool:
        numbers = [task.result() for task in [pool.submit(take) for _ in range(12)]]
    assert len({first, *numbers}) == 13
    assert min(numbers) > first
    assert take() > max(numbers)


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"last": "x"}', None])
def test_a_lost_counter_goes_on_above_what_is_current(
    pointer: ModelPointer, store_uri: str, damage: bytes | None
) -> None:
    pointer.move(pointer.read(), "a", 41, {})
    if damage:
        open_store(store_uri).write("order/tiny.json", damage)
    assert take_order(Address(uri=store_uri), "tiny") == 42


def test_going_back_by_hand_keeps_older_nights_away_and_lets_newer_ones_come(pointer: ModelPointer) -> None:
    pointer.move(pointer.read(), "a", 1, {})
    pointer.move(pointer.read(), "b", 2, {})
    assert pointer.rollback().order == 2


def test_a_release_that_was_promoted_by_hand_keeps_away_the_nights_that_began_before_its_run(
    pointer: ModelPointer, store_uri: str
) -> None:
    entry = {"config.json": ManifestEntry(2, "0" * 64, "config.json")}
    objects = open_store(f"{store_uri}/models/tiny")
    objects.write("fifth/config.json", b"{}")
    objects.write("fifth/manifest.json", Manifest("release", entry, {"order": 5}).to_bytes())
    pointer.move(pointer.read(), "a", 1, {})
    assert pointer.promote("fifth").order == 5
    assert pointer.promote("a").order == 5, "going back to an older one keeps them away as well"


def test_a_release_that_is_deleted_while_it_is_promoted_is_told(
    pointer: ModelPointer, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = pointer.move

    def move_late(*words: Any) -> bool:
        open_store(f"{store_uri}/models/tiny").delete(["a/manifest.json"])
        return move(*words)

    monkeypatch.setattr(pointer, "move", move_late)
    with pytest.raises(NotFound, match=r"a/manifest\.json: no such object"):
        pointer.promote("a")


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"null", b'{"version": 7}', b'{"version": "a", "before": 3, "order": "x"}']
)
def test_a_damaged_pointer_is_mended_by_the_next_promotion(
    pointer: ModelPointer, store_uri: str, content: bytes
) -> None:
    open_store(f"{store_uri}/models/tiny").write("current.json", content)
    assert pointer.read().version in (None, "a")
    assert pointer.read().damaged
    with pytest.raises(NoValidCheckpoint, match=r"current\.json: is damaged.*`job release promote`"):
        pointer.rollback()
    assert pointer.promote("b").version == "b"
    assert not pointer.read().damaged
    assert latest_release(f"{store_uri}/models/tiny").endswith("/b")


def test_a_pointer_that_was_damaged_on_its_way_is_read_again(
    pointer: ModelPointer, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointer.promote("a")
    kind = type(open_store(store_uri))
    read, damaged = kind.read, []

    def read_damaged(store: Store, key: str) -> Blob | None:
        found = read(store, key)
        if found is None or damaged:
            return found
        damaged.append(key)
        return Blob(found.data[:-9], found.etag)

    monkeypatch.setattr(kind, "read", read_damaged)
    standing = pointer.read()
    assert (standing.version, standing.damaged, damaged) == ("a", False, ["current.json"])
    damaged.clear()
    assert latest_release(f"{store_uri}/models/tiny").endswith("/a")
    assert damaged


def test_a_runs_pointer_is_not_taken_for_a_models(store_uri: str) -> None:
    objects = open_store(f"{store_uri}/runs/r")
    objects.write("current.json", json.dumps({"manifest": None, "epoch": 1}).encode())
    with pytest.raises(CheckpointMismatch, match="is a run"):
        ModelPointer(objects).read()
