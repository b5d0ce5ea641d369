"""What one node has kept in the store another finds, whole or not at all; nothing that happens here ends a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import read_all

import job.store.cached
from job.errors import AccessDenied, RecipeError, ResourceExhausted, SecurityRefused, Unreachable
from job.recipe import Run
from job.recipe.schema import Recipe
from job.store import SharedFolders, Store, open_store
from job.store.manifest import Manifest, ManifestEntry
from job.store.objects import ObjectInfo
from job.store.s3 import create_bucket

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


def copy_from_another(store: Store) -> None:
    for item in list(store.list(f"{KEY}/")):
        found = store.read(item.key)
        assert found
        store.write(item.key.replace(KEY, OTHER), found.data)


def test_what_was_copied_to_another_key_is_not_taken_for_it(tmp_path: Path, folder: Path, empty: Path) -> None:
    uri = str(tmp_path / "store")
    shared = open_shared(uri, tmp_path)
    shared.keep(KEY, folder)
    copy_from_another(open_store(f"{uri}/tokens"))
    assert not shared.fetch(OTHER, empty)
    assert shared.fetch(KEY, empty)


def test_a_node_that_finds_it_there_by_now_does_not_send_it_again(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "store")
    open_shared(uri, tmp_path).keep(KEY, folder)
    monkeypatch.setattr(job.store.cached, "upload_files", lambda *_: pytest.fail("sent"))
    open_shared(uri, tmp_path).keep(KEY, folder)


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


@pytest.mark.parametrize(
    "error",
    [
        AccessDenied("no right to tokens/"),
        Unreachable("the store does not answer"),
        RecipeError("a server answers 400 to a slow upload"),
        ResourceExhausted("the folder's disk is full"),
        OSError("a file of the node cannot be read"),
    ],
)
def test_a_store_that_refuses_or_is_silent_costs_no_run(
    error: Exception, tmp_path: Path, folder: Path, empty: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing:
        uri = "s3://bucket/tokens"

        def __getattr__(self, name: str) -> Any:
            def refuse(*_: Any, **__: Any) -> None:
                raise error

            return refuse

    uri = str(tmp_path / "store")
    with caplog.at_level(logging.WARNING):
        for ask in (lambda shared: shared.fetch(KEY, empty), lambda shared: shared.keep(KEY, folder)):
            caplog.clear()
            shared = open_shared(uri, tmp_path)
            vars(shared)["_store"] = Refusing()
            assert not ask(shared)
            vars(shared)["_store"] = open_store(f"{uri}/tokens")
            assert not shared.fetch(KEY, empty)
            shared.keep(KEY, folder)
            assert [str(error) in message for message in caplog.messages] == [True], "and it is not asked again"
    assert not list(open_store(f"{uri}/tokens").list(""))


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

    vars(shared)["_store"] = Older(store, {KEY: 3.1, OTHER: 2.9, "notes": 30.0})
    store.write("notes/README.txt", b"by a person")
    shared.keep(third, folder)
    assert {item.key.partition("/")[0] for item in store.list("")} == {OTHER, third, "notes"}
    assert not shared.fetch(KEY, empty) and shared.fetch(OTHER, empty)


def test_a_node_with_a_wrong_clock_costs_others_nothing(tmp_path: Path, folder: Path) -> None:
    uri = str(tmp_path / "store")
    shared = open_shared(uri, tmp_path)
    shared.keep(KEY, folder)
    vars(shared)["_store"] = Older(open_store(f"{uri}/tokens"), {KEY: -30.0})
    shared.keep(OTHER, folder)
    assert {item.key.partition("/")[0] for item in open_store(f"{uri}/tokens").list("")} == {KEY, OTHER}


def test_the_marker_of_a_folder_is_left_alone(moto: dict[str, str], tmp_path: Path, folder: Path, empty: Path) -> None:
    """The console of AWS writes an empty object with the folder's name."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in moto.items():
            patch.setenv(name, value)
        uri = "s3://markers/here"
        create_bucket("markers", moto)
        shared = open_shared(uri, tmp_path)
        client = open_store(uri)._client  # type: ignore[attr-defined]
        client.put_object(Bucket="markers", Key="here/tokens/", Body=b"")
        shared.keep(KEY, folder)
        vars(shared)["_store"] = Older(open_store(f"{uri}/tokens"), {"": 30.0})
        shared.keep(OTHER, folder)
        assert shared.fetch(KEY, empty)
        assert "here/tokens/" in [item["Key"] for item in client.list_objects_v2(Bucket="markers")["Contents"]]


class Older:
    """A store, had it been written to so many days ago."""

    def __init__(self, store: Store, days: dict[str, float]) -> None:
        self._inside, self._days = store, days

    def list(self, prefix: str) -> list[ObjectInfo]:
        return [
            ObjectInfo(item.key, item.size, item.modified - DAY_S * self._days.get(item.key.partition("/")[0], 0.0))
            for item in self._inside.list(prefix)
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)
