"""What the commit protocol asks of a store beyond reading and writing: sizes, sweeping, conditions that are real."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.errors import RecipeError, SecurityRefused, Unreachable
from job.recipe.schema import Store as Address
from job.store import open_store, publish_release
from job.store.folder import FolderStore
from job.store.objects import Blob, PreconditionFailed, SizeDiffers
from job.store.probe import probe_conditional_writes
from job.store.s3 import S3Store


def test_a_sweep_removes_what_the_dead_left_and_nothing_of_the_living(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.write("a/object", b"whole")
    for name in ("dead", "living"):
        (tmp_path / f"store/a/.partial-{name}").write_bytes(b"half")
    with (tmp_path / "store/a/.partial-living").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert store.sweep() == 1
    assert {path.name for path in (tmp_path / "store/a").iterdir()} == {"object", ".partial-living"}
    assert store.sweep() == 1


def test_an_upload_that_was_never_finished_is_swept(s3: str, tmp_path: Path) -> None:
    store = S3Store(f"{s3}/{tmp_path.name}")
    other = S3Store(f"{s3}/{tmp_path.name}-other")
    for target in (store, other):
        target._client.create_multipart_upload(Bucket=target.bucket, Key=target._full("big.safetensors"))
    assert store.sweep() == 1
    assert store.sweep() == 0
    assert other.sweep() == 1, "another run's upload was left alone"


def test_a_sweep_leaves_what_it_is_not_asked_for(s3: str, tmp_path: Path) -> None:
    for store in (FolderStore(tmp_path / "store"), S3Store(f"{s3}/{tmp_path.name}")):
        for key in ("mine/big", "other/big"):
            begin_upload(store, key)
        assert store.sweep(lambda key: key.startswith("mine/")) == 1
        assert store.sweep() == 1


def begin_upload(store: FolderStore | S3Store, key: str) -> None:
    """Leave what a kill in the middle of an upload leaves."""
    if isinstance(store, S3Store):
        store._client.create_multipart_upload(Bucket=store.bucket, Key=store._full(key))
    else:
        store.write(key, b"")
        (store.root / key).with_name(".partial-dead").write_bytes(b"half")


def test_a_release_aborts_what_its_own_run_left_half_uploaded_and_nothing_else(s3: str, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/config.json").write_text("{}")
    uri = f"{s3}/{tmp_path.name}"
    model = S3Store(f"{uri}/models/m")
    for version in ("run-0123abcd", "run-1-0123abcd", "run-0123abcd-89abcdef"):
        begin_upload(model, f"{version}/onnx/model.onnx")
    publish_release(Address(uri=uri), tmp_path / "bundle", {"name": "m", "run_id": "run"}, lambda: None)
    left = {upload["Key"].split("/")[-3] for upload in model._list_uploads()}
    assert left == {"run-1-0123abcd", "run-0123abcd-89abcdef"}


def test_an_object_that_is_no_record_is_refused_before_it_fills_the_memory(
    store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.store.objects.MAX_READ_BYTES", 4 << 20)
    store = open_store(store_uri)
    store.write("current.json", bytes((4 << 20) + 1))
    with pytest.raises(SecurityRefused, match=r"current\.json: has 4 MiB"):
        store.read("current.json")
    store.write("current.json", bytes(4 << 20))
    assert store.read("current.json") is not None


def test_an_object_of_another_size_is_not_downloaded(store_uri: str, tmp_path: Path) -> None:
    store = open_store(store_uri)
    store.write("a", b"12345")
    with pytest.raises(SizeDiffers, match="5 bytes instead of 4"):
        store.download("a", tmp_path / "copy", size=4)
    assert not (tmp_path / "copy").exists()
    store.download("a", tmp_path / "copy", size=5)


PART = 16 << 20


@pytest.mark.parametrize(
    ("there", "told"), [(0, 1), (1, 0), (0, PART + 1), (1, PART + 1), (PART + 1, PART), (PART + 1, PART + 2)]
)
def test_neither_an_empty_object_nor_one_in_ranges_is_taken_for_another_size(
    store_uri: str, tmp_path: Path, there: int, told: int
) -> None:
    store = open_store(store_uri)
    (tmp_path / "file").write_bytes(bytes(there))
    store.upload(tmp_path / "file", "a")
    with pytest.raises(SizeDiffers, match=f"{there} bytes instead of {told}"):
        store.download("a", tmp_path / "copy", size=told)
    assert not (tmp_path / "copy").exists()
    store.download("a", tmp_path / "copy", size=there)
    assert (tmp_path / "copy").read_bytes() == bytes(there)


@pytest.fixture
def in_ranges(s3: str, tmp_path: Path) -> S3Store:
    """A store with an object `a` of 40 MiB, which is read in ranges."""
    store, file = S3Store(f"{s3}/{tmp_path.name}"), tmp_path / "file"
    file.write_bytes(bytes(40 << 20))
    store.upload(file, "a")
    return store


def test_an_object_that_changes_while_it_is_read_is_not_taken_for_one(
    in_ranges: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_range, file_of_others = in_ranges._begin_range, tmp_path / "other"
    file_of_others.write_bytes(b"\1" * (40 << 20))

    def begin_while_others_write(wanted: dict[str, str], count: int) -> tuple[Any, bytes]:
        if wanted["Range"].startswith("bytes=0-"):
            in_ranges.upload(file_of_others, "a")
        return begin_range(wanted, count)

    monkeypatch.setattr(in_ranges, "_begin_range", begin_while_others_write)
    with pytest.raises(Unreachable, match="changed while it was read"):
        in_ranges.download("a", tmp_path / "copy")


def test_an_object_of_a_known_size_that_changes_after_its_first_range_is_not_taken_for_one(
    in_ranges: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, file_of_others = in_ranges._begin, tmp_path / "other"
    file_of_others.write_bytes(b"\1" * (40 << 20))

    def begin_before_others_write(source: Any) -> Any:
        begun = begin(source)
        in_ranges.upload(file_of_others, "a")
        return begun

    monkeypatch.setattr(in_ranges, "_begin", begin_before_others_write)
    with pytest.raises(Unreachable, match="changed while it was read"):
        in_ranges.download("a", tmp_path / "copy", size=40 << 20)


def test_a_server_that_gives_no_ranges_is_77_and_not_taken_for_a_damaged_object(
    in_ranges: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_object = in_ranges._client.get_object
    monkeypatch.setattr(in_ranges._client, "get_object", lambda Range="", **asked: get_object(**asked))
    with pytest.raises(Unreachable, match="know ranges"):
        in_ranges.download("a", tmp_path / "copy", size=40 << 20)


def test_the_probe_accepts_a_store_with_conditions_and_leaves_nothing(store_uri: str) -> None:
    probe_conditional_writes(open_store(store_uri))
    assert not list(open_store(store_uri).list(""))


@pytest.mark.parametrize("ignored", ["if_absent", "if_match"])
def test_the_probe_refuses_a_store_that_ignores_a_condition(
    tmp_path: Path, ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path / "store")
    write = store.write
    ignore = {ignored: None}
    monkeypatch.setattr(store, "write", lambda key, data, **conditions: write(key, data, **conditions | ignore))
    with pytest.raises(RecipeError, match=r"store\.single_writer: true") as caught:
        probe_conditional_writes(store)
    assert caught.value.exit_code == 10


@pytest.mark.parametrize("change", [lambda found: None, lambda found: Blob(found.data, f"W/{found.etag}")])
def test_the_probe_refuses_a_store_whose_answers_to_reading_do_not_fit_its_conditions(
    tmp_path: Path, change: Callable[[Blob], Blob | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path / "store")
    read = store.read
    monkeypatch.setattr(store, "read", lambda key: change(read(key)))
    monkeypatch.setattr(store, "_check", lambda key, if_absent, if_match: check(store.root / key, if_absent, if_match))

    def check(path: Path, if_absent: bool, if_match: str | None) -> None:
        standing = read(path.name) if path.exists() else None
        if (if_absent and standing) or (if_match and (not standing or standing.etag != if_match)):
            raise PreconditionFailed("another object is there")

    with pytest.raises(RecipeError, match=r"right after it was written|refused a write whose condition held"):
        probe_conditional_writes(store)


def test_with_a_single_writer_the_conditions_hold_without_the_servers_help(s3: str, tmp_path: Path) -> None:
    store = open_store(f"{s3}/{tmp_path.name}", single_writer=True)
    etag = store.write("a", b"1", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.write("a", b"2", if_absent=True)
    store.write("a", b"3", if_match=etag)
    with pytest.raises(PreconditionFailed):
        store.write("a", b"4", if_match=etag)
    probe_conditional_writes(store)


def test_a_lock_that_a_stopped_process_holds_is_waited_for_then_77(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.store.folder._LOCK_WAIT_S", 0.2)
    store = FolderStore(tmp_path / "store")
    store.write("a", b"1")
    handle = os.open(tmp_path / "store", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(Unreachable, match="probably stopped"):
        store.write("a", b"2")
    os.close(handle)
    store.write("a", b"3")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["a"]


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOTSUP], ids=["ENOLCK", "ENOTSUP"])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, kind: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("job.store.folder.fcntl.flock", refuse)
    with pytest.raises(RecipeError, match="file system without locks") as caught:
        FolderStore(tmp_path / "store").write("a", b"1", if_absent=True)
    assert caught.value.exit_code == 10


def test_deleting_leaves_no_empty_folder_but_the_store_itself(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    for key in ("a/b/c/one", "a/b/two", "d/three", "e/stays", "e/goes"):
        store.write(key, b"")
    store.delete(["a/b/c/one", "a/b/two", "d/three", "e/goes", "absent/key"])
    assert sorted(path.relative_to(store.root).as_posix() for path in store.root.rglob("*")) == ["e", "e/stays"]
    store.delete(["e/stays"])
    assert list(store.root.iterdir()) == []


def test_a_folder_that_is_emptied_just_before_something_is_written_there_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where one run is pruned while another releases."""
    store, make, emptied = FolderStore(tmp_path / "store"), Path.mkdir, []
    store.write("a/b/old", b"")

    def make_then_empty(path: Path, *words: Any, **options: Any) -> None:
        make(path, *words, **options)
        if path.name == "b" and not emptied:
            emptied.append(path)
            FolderStore(tmp_path / "store").delete(["a/b/old"])

    monkeypatch.setattr(Path, "mkdir", make_then_empty)
    store.write("a/b/new", b"", if_absent=True)
    assert emptied
    assert [item.key for item in store.list("")] == ["a/b/new"]


def test_folders_that_are_emptied_meanwhile_fail_no_write_listing_or_sweep(tmp_path: Path) -> None:
    ready, errors = threading.Barrier(4), []

    def work(change: Callable[[FolderStore, int], object]) -> None:
        store = FolderStore(tmp_path / "store")
        ready.wait()
        try:
            for number in range(300):
                change(store, number)
        except Exception as error:
            errors.append(error)

    changes: list[Callable[[FolderStore, int], object]] = [
        lambda store, number: store.write("a/b/one", b"", if_absent=store.read("a/b/one") is None),
        lambda store, number: store.delete(["a/b/one"]),
        lambda store, number: list(store.list("")),
        lambda store, number: store.sweep(lambda key: False),
    ]
    threads = [threading.Thread(target=work, args=(change,)) for change in changes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
