"""Publishing again after a kill or damage: the release is whole, and what this run left half uploaded is gone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from job.errors import AccessDenied, Fenced
from job.recipe.schema import Store as Address
from job.store import ModelPointer, open_store, publish_release
from job.store.release import read_release_manifest


class Killed(BaseException):
    """The process is gone."""


def die() -> None:
    raise Killed


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def publish(
    uri: str, bundle: Path, recipe: str, verify: Callable[[], None] = lambda: None, run_id: str = "run-1"
) -> str:
    """Publish as an attempt with this recipe does, whose hash is part of the version."""
    about = {"name": "tiny", "run_id": run_id, "recipe_sha256": recipe}
    return publish_release(Address(uri=uri), bundle, about, verify)


def leave_half(uri: str, bundle: Path, recipe: str, run_id: str = "run-1") -> str:
    """Leave what a kill before the manifest leaves; return the version."""
    before = list_versions(uri)
    with pytest.raises(Killed):
        publish(uri, bundle, recipe, die, run_id)
    (version,) = list_versions(uri) - before
    return version


def list_versions(uri: str) -> set[str]:
    return {item.key.split("/")[0] for item in open_store(f"{uri}/models/tiny").list("")} - {"current.json"}


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"", lambda data: data.replace(b"run", b"rum")]
)
def test_a_manifest_that_was_damaged_is_written_anew_before_anybody_follows_it(
    store_uri: str, bundle: Path, damage: Callable[[bytes], bytes]
) -> None:
    version = publish(store_uri, bundle, "one")
    uri = f"{store_uri}/models/tiny/{version}"
    found = open_store(uri).read("manifest.json")
    assert found
    open_store(uri).write("manifest.json", damage(found.data))
    assert publish(store_uri, bundle, "one") == version
    assert read_release_manifest(uri)[1].sha256.startswith(version[-8:])


def test_what_a_killed_attempt_left_of_another_version_goes(store_uri: str, bundle: Path) -> None:
    leave_half(store_uri, bundle, "one")
    version = publish(store_uri, bundle, "two")
    assert list_versions(store_uri) == {version}


def test_whole_versions_and_those_of_other_runs_stay(tmp_path: Path, bundle: Path) -> None:
    uri = str(tmp_path / "store")
    halves = {leave_half(uri, bundle, "one", run) for run in ("run", "run-1-0123abcd", "run-11", "other-run-1")}
    whole = publish(uri, bundle, "two")
    damaged = publish(uri, bundle, "three")
    open_store(f"{uri}/models/tiny").write(f"{damaged}/manifest.json", b"{")
    newest = publish(uri, bundle, "four")
    assert list_versions(uri) == {*halves, whole, damaged, newest}


def test_a_version_that_users_follow_stays_even_where_its_manifest_was_lost(tmp_path: Path, bundle: Path) -> None:
    uri = str(tmp_path / "store")
    before, current = publish(uri, bundle, "one"), publish(uri, bundle, "two")
    for version in (before, current):
        ModelPointer.of(Address(uri=uri), "tiny").promote(version)
    open_store(f"{uri}/models/tiny").delete([f"{version}/manifest.json" for version in (before, current)])
    publish(uri, bundle, "three")
    assert list_versions(uri) >= {before, current}


def test_who_lost_the_run_deletes_nothing_that_its_successor_uploads(tmp_path: Path, bundle: Path) -> None:
    uri = str(tmp_path / "store")
    half = leave_half(uri, bundle, "one")

    def refuse() -> None:
        raise Fenced("a newer attempt owns this run")

    with pytest.raises(Fenced):
        publish(uri, bundle, "two", refuse)
    assert half in list_versions(uri)


def deny(*_: object) -> None:
    raise AccessDenied("no right to delete")


def overtaken_by(successor: Callable[[], object]) -> Callable[[], None]:
    """Be the owner when asked first, then sleep until a successor, who owns the run from then on, has done its work."""
    asked: list[int] = []

    def verify() -> None:
        asked.append(1)
        if len(asked) > 1:
            raise Fenced("a newer attempt owns this run")
        successor()

    return verify


def test_a_zombie_leaves_no_manifest_of_files_that_its_successor_has_deleted(store_uri: str, bundle: Path) -> None:
    made: list[str] = []
    with pytest.raises(Fenced):
        publish(store_uri, bundle, "one", overtaken_by(lambda: made.append(publish(store_uri, bundle, "two"))))
    assert list_versions(store_uri) == set(made)


def test_a_zombie_that_may_delete_nothing_is_fenced_all_the_same(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "store")

    def succeed() -> None:
        publish(uri, bundle, "two")
        monkeypatch.setattr("job.store.folder.FolderStore.delete", deny)

    with pytest.raises(Fenced):
        publish(uri, bundle, "one", overtaken_by(succeed))


def test_a_zombie_leaves_the_manifest_of_the_version_that_its_successor_made_as_well(
    store_uri: str, bundle: Path
) -> None:
    made: list[str] = []
    with pytest.raises(Fenced):
        publish(store_uri, bundle, "one", overtaken_by(lambda: made.append(publish(store_uri, bundle, "one"))))
    objects, manifest = read_release_manifest(f"{store_uri}/models/tiny/{made[0]}")
    assert all(objects.read(entry.key) for entry in manifest.files.values())


def test_a_manifest_that_a_zombie_writes_just_before_its_files_are_deleted_goes_with_them(
    tmp_path: Path, bundle: Path
) -> None:
    uri = str(tmp_path / "store")
    half, written = leave_half(uri, bundle, "one"), []
    manifest = (bundle / "manifest.json").read_bytes()

    def wake_zombie() -> None:
        if not written:
            written.append(open_store(f"{uri}/models/tiny").write(f"{half}/manifest.json", manifest))

    version = publish(uri, bundle, "two", wake_zombie)
    assert list_versions(uri) == {version}


def test_who_may_not_delete_releases_all_the_same(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = str(tmp_path / "store")
    leave_half(uri, bundle, "one")
    monkeypatch.setattr("job.store.folder.FolderStore.delete", deny)
    with caplog.at_level(logging.WARNING):
        version = publish(uri, bundle, "two")
    assert "no right to delete" in caplog.text
    assert read_release_manifest(f"{uri}/models/tiny/{version}")
