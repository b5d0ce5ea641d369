"""What one node has kept in the store another finds, whole or not at all; nothing that happens here ends a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.errors import AccessDenied, SecurityRefused, Unreachable
from job.recipe import Run
from job.recipe.schema import Recipe
from job.store import SharedFolders, Store, open_store
from job.store.manifest import Manifest, ManifestEntry
from job.store.objects import ObjectInfo

KEY, OTHER = "0" * 64, "1" * 64
DAY_S = 86_400.0


def open_shared(uri: str, work: Path, days: int = 7) -> SharedFolders:
    sections = {"name": "x", "task": "text-classification", "model": {"id": "m"}, "data": {"source": "d"}}
    return SharedFolders(Run("run", Recipe.model_validate(sections | {"store": {"uri": uri}}), work), "tokens", days)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "table"
    (place / "below").mkdir(parents=True)
    (place / "tokens.npy").write_bytes(bytes(range(256)) * 10)
    (place / "below" / "about.json").write_text("{}")
    return place


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    place = tmp_path / "fetched"
    place.mkdir()
    return place


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_one_node_keeps_another_finds(store_uri: str, tmp_path: Path, folder: Path, empty: Path) -> None:
    assert not open_shared(store_uri, tmp_path).fetch(KEY, empty)
    open_shared(store_uri, tmp_path).keep(KEY, folder)
    assert not open_shared(store_uri, tmp_path).fetch(OTHER, empty) and not read_all(empty)
    assert open_shared(store_uri, tmp_path).fetch(KEY, empty)
    assert read_all(empty) == read_all(folder)


def flip(store: Store) -> None:
    store.write(f"{KEY}/tokens.npy", bytes(2560))


def cut(store: Store) -> None:
    store.write(f"{KEY}/tokens.npy", b"short")


def delete(store: Store) -> None:
    store.delete([f"{KEY}/below/about.json"])


def damage_manifest(store: Store) -> None:
    found = store.read(f"{KEY}/manifest.json")
    assert found
    store.write(f"{KEY}/manifest.json", found.data.replace(b"tokens.npy", b"tokens.npz"))


@pytest.mark.parametrize("damage", [flip, cut, delete, damage_manifest])
def test_what_is_damaged_is_made_again_and_then_whole_for_others(
    damage: Callable[[Store], None], tmp_path: Path, folder: Path, empty: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = str(tmp_path / "store")
    shared = open_shared(uri, tmp_path)
    shared.keep(KEY, folder)
    damage(open_store(f"{uri}/tokens"))
    with caplog.at_level(logging.WARNING):
        assert not shared.fetch(KEY, empty)
    assert "made again on this node" in caplog.text
    assert empty.is_dir() and not read_all(empty), "nothing of it is left to be taken for a table"
    shared.keep(KEY, folder)
    assert shared.fetch(KEY, empty) and read_all(empty) == read_all(folder)


def test_a_kill_before_the_manifest_leaves_nothing_to_find(tmp_path: Path, folder: Path, empty: Path) -> None:
    uri = str(tmp_path / "store")
    open_store(f"{uri}/tokens").upload(folder / "tokens.npy", f"{KEY}/tokens.npy")
    assert not open_shared(uri, tmp_path).fetch(KEY, empty)


def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, empty: Path) -> None:
    uri = str(tmp_path / "store")
    hostile = Manifest("tokens", {"../outside": ManifestEntry(1, "0" * 64, f"{KEY}/outside")}).to_bytes()
    open_store(f"{uri}/tokens").write(f"{KEY}/manifest.json", hostile)
    with pytest.raises(SecurityRefused):
        open_shared(uri, tmp_path).fetch(KEY, empty)


@pytest.mark.parametrize("error", [AccessDenied("no right to tokens/"), Unreachable("the store does not answer")])
def test_a_store_that_refuses_or_is_silent_costs_no_run(
    error: Exception, tmp_path: Path, folder: Path, empty: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing:
        uri = "s3://bucket/tokens"

        def __getattr__(self, name: str) -> Any:
            def refuse(*_: Any, **__: Any) -> None:
                raise error

            return refuse

    shared = open_shared(str(tmp_path / "store"), tmp_path)
    vars(shared)["_store"] = Refusing()
    with caplog.at_level(logging.WARNING):
        assert not shared.fetch(KEY, empty)
        shared.keep(KEY, folder)
    assert [str(error) in message for message in caplog.messages] == [True, True]


def test_the_stores_clock_says_when_something_was_written(store_uri: str) -> None:
    store = open_store(store_uri)
    store.write("first", b"1")
    time.sleep(1.1)  # S3 tells whole seconds
    store.write("second", b"2")
    written = {item.key: item.modified for item in store.list("")}
    assert written["first"] < written["second"] < written["first"] + 60


def test_what_was_kept_for_too_long_goes_when_something_is_kept(tmp_path: Path, folder: Path, empty: Path) -> None:
    uri = str(tmp_path / "store")
    shared, third = open_shared(uri, tmp_path, days=3), "2" * 64
    store = open_store(f"{uri}/tokens")
    for key in (KEY, OTHER):
        shared.keep(key, folder)

    class Older:
        """The store, had it been written to on other days."""

        days = {KEY: 3.1, OTHER: 2.9}

        def list(self, prefix: str) -> list[ObjectInfo]:
            return [
                ObjectInfo(item.key, item.size, item.modified - DAY_S * self.days.get(item.key.partition("/")[0], 0.0))
                for item in store.list(prefix)
            ]

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

    vars(shared)["_store"] = Older()
    shared.keep(third, folder)
    assert {item.key.partition("/")[0] for item in store.list("")} == {OTHER, third}
    assert not shared.fetch(KEY, empty) and shared.fetch(OTHER, empty)
