"""Every store keeps the same promises: one suite for each of them, and by `make s3-conformance` for yours."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.errors import AccessDenied, JobError, NotFound, RecipeError, SecurityRefused, Unreachable
from job.store import Store, open_store
from job.store.held import HeldFile
from job.store.objects import MAX_KEY_DEPTH, MAX_KEY_LENGTH, PreconditionFailed, check_key

LARGE_BYTES = (16 << 20) + 12_345  # more than one part of a multipart upload


@pytest.fixture
def store(store_uri: str) -> Store:
    return open_store(store_uri)


def test_what_was_written_is_read_back(store: Store) -> None:
    for data in (b"", b"\x00\xff" * 1000, b"second"):
        etag = store.write("a/b.json", data)
        found = store.read("a/b.json")
        assert found is not None
        assert (found.data, found.etag) == (data, etag)


@pytest.mark.parametrize("key", ["absent", "a/absent", "a/file/below", "a"])
def test_an_absent_object_reads_as_none(store: Store, key: str) -> None:
    store.write("a/file", b"x")
    assert store.read(key) is None


def test_unusual_but_plain_keys_work(store: Store) -> None:
    keys = ["ünï/çødé", "a b+c&d=e?f#g%20", "~tilde", "..dots..", "-dash", "a/b/c/d/e/f/g/h", "x" * 200]
    for key in keys:
        store.write(key, key.encode())
    assert {item.key for item in store.list("")} == set(keys)
    assert all(store.read(key).data == key.encode() for key in keys)  # type: ignore[union-attr]


def test_if_absent_writes_only_where_nothing_is(store: Store) -> None:
    store.write("pointer", b"first", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.write("pointer", b"second", if_absent=True)
    assert store.read("pointer").data == b"first"  # type: ignore[union-attr]


def test_if_match_writes_only_over_the_version_that_was_read(store: Store) -> None:
    with pytest.raises(JobError):
        store.write("pointer", b"zeroth", if_match='"0123456789abcdef0123456789abcdef"')
    assert store.read("pointer") is None
    first = store.write("pointer", b"first")
    second = store.write("pointer", b"second", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.write("pointer", b"third", if_match=first)
    store.write("pointer", b"fourth", if_match=second)
    assert store.read("pointer").data == b"fourth"  # type: ignore[union-attr]


@pytest.mark.parametrize("start", ["absent", "present"])
def test_of_eight_writers_exactly_one_wins(store: Store, start: str) -> None:
    etag = store.write("pointer", b"start") if start == "present" else None
    ready, winners = threading.Barrier(8), []

    def swap(number: int) -> None:
        own = open_store(store.uri)
        ready.wait()
        try:
            own.write("pointer", b"%d" % number, if_absent=etag is None, if_match=etag)
            winners.append(number)
        except PreconditionFailed:
            pass

    threads = [threading.Thread(target=swap, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert store.read("pointer").data == b"%d" % winners[0]  # type: ignore[union-attr]


def test_listing_finds_every_key_with_the_prefix_and_no_other(store: Store) -> None:
    for key in ("a/one", "a/two", "a/deep/three", "ab/four", "b"):
        store.write(key, key.encode())
    assert {item.key: item.size for item in store.list("a/")} == {"a/one": 5, "a/two": 5, "a/deep/three": 12}
    assert {item.key for item in store.list("a")} == {"a/one", "a/two", "a/deep/three", "ab/four"}
    assert {item.key for item in store.list("a/deep/")} == {"a/deep/three"}
    assert {item.key for item in store.list("")} == {"a/one", "a/two", "a/deep/three", "ab/four", "b"}
    assert list(store.list("absent/")) == []


def test_folders_are_listed_without_what_lies_in_them(store: Store) -> None:
    for key in ("a/one/x", "a/one/deep/y", "a/two é/z", "a/file", "ab/four/x", "b"):
        store.write(key, b"")
    assert set(store.list_folders("a/")) == {"a/one/", "a/two é/"}
    assert set(store.list_folders("")) == {"a/", "ab/"}
    assert list(store.list_folders("absent/")) == []


def test_listing_goes_on_past_a_thousand_keys(store: Store) -> None:
    keys = {f"many/{number:04d}" for number in range(1005)}
    for key in sorted(keys):
        store.write(key, b"")
    assert {item.key for item in store.list("many/")} == keys
    folders = {f"{key}/" for key in keys}
    store.delete(sorted(keys))
    for folder in sorted(folders):
        store.write(f"{folder}file", b"")
    assert set(store.list_folders("many/")) == folders
    store.delete([f"{folder}file" for folder in sorted(folders)])
    assert list(store.list("many/")) == []


def test_deleting_removes_what_is_named_and_minds_nothing_absent(store: Store) -> None:
    store.write("a/one", b"1")
    store.write("a/two", b"2")
    store.delete(["a/one", "a/absent", "nowhere/at/all"])
    assert [item.key for item in store.list("")] == ["a/two"]
    store.delete([])


@pytest.mark.parametrize("size", [0, 1, LARGE_BYTES], ids=["empty", "byte", "parts"])
def test_a_file_comes_back_as_it_went(store: Store, tmp_path: Path, size: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    store.upload(source, "files/large.bin")
    store.download("files/large.bin", target)
    assert target.read_bytes() == source.read_bytes()
    assert [item.size for item in store.list("files/")] == [size]


@pytest.mark.parametrize("size", [0, 1, 5 << 20, LARGE_BYTES], ids=["empty", "byte", "part", "parts"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_file_that_lies_in_memory_comes_back_as_one_from_disk(
    store: Store, tmp_path: Path, size: int, where: str
) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    source, target = hold(data, tmp_path / "source"), tmp_path / "target"
    if where == "disk":
        source.move_to_disk()
    store.upload(source, "files/large.bin")
    store.download("files/large.bin", target)
    assert target.read_bytes() == data
    assert [item.size for item in store.list("files/")] == [size]


def hold(data: bytes, path: Path) -> HeldFile:
    """Return a file of uneven parts."""
    return HeldFile(
        [memoryview(data)[:7], memoryview(b""), memoryview(data)[7:70_000], memoryview(data)[70_000:]], path
    )


def test_an_upload_replaces_the_whole_object(store: Store, tmp_path: Path) -> None:
    for data in (b"a longer first version", b"short"):
        (tmp_path / "source").write_bytes(data)
        store.upload(tmp_path / "source", "file")
    assert store.read("file").data == b"short"  # type: ignore[union-attr]


def test_downloading_what_is_absent_says_so_and_leaves_no_file(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        store.download("absent", tmp_path / "target")
    assert caught.value.exit_code == 13
    assert list(tmp_path.glob("target*")) == []


def is_plain(key: str) -> bool:
    parts = key.split("/")
    return not (
        set(parts) & {"", ".", ".."}
        or any(character == "\\" or not character.isprintable() for character in key)
        or len(parts) > MAX_KEY_DEPTH
        or len(key.encode(errors="replace")) > MAX_KEY_LENGTH
    )


HOSTILE = [
    "", "/", "/etc/passwd", "..", "../x", "a/../x", "a/..", "./a", "a/.", "a//b", "a/", "a\\b", "a\x00b", "a\nb",
    "a\x7f", "a\x85b", "a\ud800b", "a/b/c/d/e/f/g/h/i", "x" * 300, "x/" * 7 + "y" * 600, "é" * 300,
]  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE, ids=ascii)
def test_a_hostile_key_is_refused_by_every_call(store: Store, tmp_path: Path, key: str) -> None:
    (tmp_path / "source").write_bytes(b"x")
    calls = [
        lambda: store.read(key),
        lambda: store.write(key, b"x"),
        lambda: store.write(key, b"x", if_absent=True),
        lambda: store.upload(tmp_path / "source", key),
        lambda: store.download(key, tmp_path / "target"),
        lambda: store.delete([key]),
    ]
    for call in calls:
        with pytest.raises(SecurityRefused) as caught:
            call()
        assert caught.value.exit_code == 19
    assert list(store.list("")) == []


@pytest.mark.parametrize("prefix", ["/", "/etc/", "../", "a/../../", "a//", "a\x00/"], ids=ascii)
def test_a_hostile_prefix_lists_nothing_outside(store: Store, prefix: str) -> None:
    for call in (store.list, store.list_folders):
        with pytest.raises(SecurityRefused):
            list(call(prefix))


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["a", "..", ".", "", "b c", "é", "\\", "\x00", "\ud800", "~", "x" * 70]), max_size=10))
def test_no_key_that_passes_leads_out_of_a_folder(parts: list[str]) -> None:
    key, root = "/".join(parts), Path("/some/store")
    try:
        check_key(key)
    except SecurityRefused:
        return
    assert is_plain(key)
    assert (root / key).resolve().is_relative_to(root)
    assert (root / key).resolve() != root


@settings(max_examples=300)
@given(st.text(max_size=40))
def test_any_text_is_a_plain_key_or_refused(key: str) -> None:
    try:
        assert check_key(key) == key
    except SecurityRefused:
        assert not is_plain(key)


def test_a_symlink_does_not_lead_out_of_a_folder_store(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "store"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    root.mkdir()
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "loop").symlink_to(root / "loop")
    store = open_store(str(root))
    for key in ("folder/secret", "file", "folder/new/deep"):
        with pytest.raises(SecurityRefused):
            store.read(key)
        with pytest.raises(SecurityRefused):
            store.download(key, tmp_path / "target")
        with pytest.raises(SecurityRefused):
            store.write(key, b"x")
        with pytest.raises(SecurityRefused):
            store.delete([key])
    with pytest.raises(JobError):
        store.read("loop")
    assert list(store.list("")) == []
    with pytest.raises(SecurityRefused):
        list(store.list("folder/"))
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"secret": b"secret"}


def test_nobody_waits_for_a_pipe_in_a_folder_store(tmp_path: Path) -> None:
    root = tmp_path / "store"
    (root / "a").mkdir(parents=True)
    for name in ("a/record.json", ".partial-left"):
        os.mkfifo(root / name)
    store = open_store(str(root))
    calls: list[Callable[[str], object]] = [
        store.read,
        lambda key: store.download(key, tmp_path / "target"),
        lambda key: store.write(key, b"", if_absent=True),
    ]
    for act in calls:
        with pytest.raises(SecurityRefused, match=r"a/record\.json is a pipe or a device"):
            act("a/record.json")
    assert list(store.list("")) == []
    assert store.sweep() == 0


def test_a_folder_store_reached_through_a_symlink_works(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = open_store(f"file://{tmp_path / 'link'}")
    store.write("a/b", b"x")
    assert [item.key for item in store.list("")] == ["a/b"]
    assert (tmp_path / "real/a/b").read_bytes() == b"x"


def test_a_store_in_a_place_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(JobError) as caught:
        open_store(str(tmp_path / "file")).write("a", b"x")
    assert caught.value.exit_code in (13, 78)
    assert "store.uri" in str(caught.value)


def test_a_missing_bucket_is_not_found(s3: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    store = open_store(f"{s3}-which-is-not-there/prefix")
    for call in (
        lambda: list(store.list("")),
        lambda: store.write("a", b"x"),
        lambda: store.upload(tmp_path / "source", "a"),
    ):
        with pytest.raises(NotFound, match=r"which-is-not-there' does not exist; create it or correct store\.uri"):
            call()


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_a_wrong_credential_is_denied_and_never_looks_like_absence(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    open_store(f"{s3}/denied").write("a", b"x")
    monkeypatch.setenv(variable, "0123456789abcdef0123")
    store = open_store(f"{s3}/denied")
    for call in (
        lambda: store.read("absent"),
        lambda: list(store.list("")),
        lambda: store.write("a", b"y", if_absent=True),
        lambda: store.upload(tmp_path / "source", "b"),
        lambda: store.download("a", tmp_path / "target"),
        lambda: store.delete(["a"]),
    ):
        with pytest.raises(AccessDenied, match="check the credentials") as caught:
            call()
        assert caught.value.exit_code == 12


def test_no_credentials_at_all_are_named(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(AccessDenied, match="no credentials; set AWS_ACCESS_KEY_ID"):
        open_store(f"{s3}/denied").read("a")


def test_plain_http_to_another_machine_is_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store.example.org:9000")
    with pytest.raises(SecurityRefused, match=r"store\.allow_http"):
        open_store(s3)
    assert open_store(s3, allow_http=True).uri == s3


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "localhost:9000", "htp://127.0.0.1:9000", "http://"])
def test_an_endpoint_that_is_no_address_is_refused_at_once_with_what_one_looks_like(
    s3: str, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    with pytest.raises(RecipeError, match=r"check AWS_ENDPOINT_URL_S3 \(https://host or https://host:port") as caught:
        open_store(s3)
    assert endpoint in str(caught.value)


def test_who_waits_for_a_store_that_does_not_answer_is_told_so(
    s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("job").propagate = True
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 8.0)
    monkeypatch.setattr("job.store.s3._SILENT_S", 0.2)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(Unreachable):
        open_store(s3).read("a")
    (said,) = (each.getMessage() for each in caplog.records)
    assert re.fullmatch(rf"{s3}: cannot read a yet \(EndpointConnectionError\); trying again for [5-8] s", said)


def test_a_store_that_does_not_answer_is_unreachable_after_the_deadline(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    store = open_store(s3)
    for call in (lambda: store.read("a"), lambda: store.upload(tmp_path / "source", "a")):
        with pytest.raises(Unreachable) as caught:
            call()
        assert caught.value.exit_code == 77
