"""A manifest survives its round trip, a damaged one is refused, and nothing unverified reaches a folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Barrier, Lock
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.errors import JobError, NoValidCheckpoint, ResourceExhausted, SecurityRefused
from job.store import Manifest, ManifestEntry, Store, open_store
from job.store.manifest import describe_files, hash_file, list_files
from job.store.records import dump_sealed
from job.store.transfer import download_files, upload_files, verify_objects

NAMES = st.text("abcdé .-_~", min_size=1, max_size=8).filter(lambda name: name not in (".", ".."))
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    paths = draw(st.lists(PATHS, min_size=1, max_size=5, unique=True))
    paths = [path for path in paths if not any(other.startswith(f"{path}/") for other in paths)]
    entry = st.builds(
        ManifestEntry, st.integers(0, 2**50), st.text("0123456789abcdef", min_size=64, max_size=64), PATHS
    )
    files = {path: draw(entry) for path in paths}
    return Manifest(draw(st.sampled_from(["checkpoint", "release"])), files, draw(st.dictionaries(st.text(), JSON)))


FILES = {"config.json": b"{}", "onnx/model.onnx": bytes(range(256)) * 40, "empty": b"", "deep/er/é.txt": b"text"}
SAMPLE = Manifest(
    "release", {path: ManifestEntry(len(data), "0" * 64, path) for path, data in FILES.items()}, {"name": "n"}
).to_bytes()


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Store, Manifest]:
    """A store that holds FILES, and their manifest."""
    folder = tmp_path / "source"
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    entries = describe_files(folder, list_files(folder), "sets/one")
    store = open_store(str(tmp_path / "store"))
    upload_files(store, folder, entries)
    return store, Manifest("release", entries)


@settings(max_examples=200)
@given(manifests())
def test_a_manifest_reads_back_as_it_was_written(manifest: Manifest) -> None:
    parsed = Manifest.parse(manifest.to_bytes(), "here")
    assert parsed == manifest
    assert parsed.sha256 == manifest.sha256


@settings(max_examples=600)
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.binary(max_size=3)), min_size=1, max_size=4))
def test_a_mutated_manifest_is_refused_or_leads_nowhere_else(mutations: list[tuple[int, bytes]]) -> None:
    data = bytearray(SAMPLE)
    for place, replacement in mutations:
        data[place : place + 1] = replacement
    try:
        manifest = Manifest.parse(bytes(data), "here")
    except (NoValidCheckpoint, SecurityRefused):
        return
    for path, entry in manifest.files.items():
        for name in (path, entry.key):
            assert Path("/root", name).resolve().is_relative_to("/root")
        assert entry.size >= 0
    assert manifest.sha256


@settings(max_examples=200)
@given(st.integers(0, len(SAMPLE) - 2))
def test_a_manifest_cut_short_is_never_whole(length: int) -> None:
    with pytest.raises(NoValidCheckpoint, match=r"here: not a manifest \(damaged or cut short\)"):
        Manifest.parse(SAMPLE[:length], "here")


def entry(**changes: object) -> dict[str, object]:
    return {"size": 1, "sha256": "0" * 64, "key": "k"} | changes


MALFORMED = [
    b"", b"null", b"[]", b"7", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000,
    json.dumps({"kind": "release", "files": {}, "about": {}}).encode(),
    json.dumps({"kind": "release", "files": [], "about": {}}).encode(),
    json.dumps({"files": {"a": entry()}, "about": {}}).encode(),
    json.dumps({"kind": "release", "files": {"a": entry()}}).encode(),
    json.dumps({"kind": "release", "files": {"a": None}, "about": {}}).encode(),
    json.dumps({"kind": "release", "files": {"a": entry(extra=1)}, "about": {}}).encode(),
    json.dumps({"kind": "release", "files": {"a": entry(size=-1)}, "about": {}}).encode(),
    json.dumps({"kind": "release", "files": {"a": entry(size=True)}, "about": {}}).encode(),
    json.dumps({"kind": "release", "files": {"a": entry(size=1e300)}, "about": {}}).encode(),
    json.dumps({"kind": "release", "files": {"a": entry(sha256=None)}, "about": {}}).encode(),
    json.dumps({"kind": "release", "files": {"a": entry(sha256="short")}, "about": {}}).encode(),
    json.dumps({"kind": "release", "files": {"a": entry(key=None)}, "about": {}}).encode(),
    json.dumps({"kind": "release", "files": {"a": entry(), "a/b": entry()}, "about": {}}).encode(),
    json.dumps({"kind": "release", "files": {"a": entry()}, "about": 7}).encode(),
    b'{"kind": "release", "files": {"a": {"size": 1' + b"0" * 5000 + b', "sha256": "", "key": ""}}, "about": {}}',
]  # fmt: skip


@pytest.mark.parametrize("data", MALFORMED, ids=lambda data: ascii(data[:60]))
def test_what_is_no_manifest_is_17(data: bytes) -> None:
    with pytest.raises(NoValidCheckpoint) as caught:
        Manifest.parse(data, "here")
    assert caught.value.exit_code == 17


@pytest.mark.parametrize("depth", [100, 300, 900, 980, 2000])
def test_a_deeply_nested_manifest_is_refused_or_can_be_written_again(depth: int) -> None:
    about = '{"x":' * depth + "1" + "}" * depth
    data = f'{{"kind": "release", "files": {{"a": {json.dumps(entry())}}}, "about": {about}}}'.encode()
    try:
        assert Manifest.parse(data, "here").sha256
    except NoValidCheckpoint:
        pass


@pytest.mark.parametrize("depth", range(900, 1000, 3))
def test_a_sealed_manifest_that_is_nested_as_deep_as_can_be_is_refused_or_read(depth: int) -> None:
    about: dict[str, object] = {}
    for _ in range(depth):
        about = {"x": about}
    try:
        data = dump_sealed({"about": about, "files": {"a": entry()}, "kind": "release"})
    except RecursionError:
        return  # so deep it cannot be written, nor sealed
    try:
        assert Manifest.parse(data, "here").to_bytes() == data
    except NoValidCheckpoint:
        pass


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a\\b", "a/../b", "a\x00b", "\ud800", "a//b"], ids=ascii)
def test_a_manifest_with_a_hostile_path_or_key_is_refused(name: str) -> None:
    for files in ({name: ManifestEntry(1, "0" * 64, "k")}, {"a": ManifestEntry(1, "0" * 64, name)}):
        data = Manifest("release", files, {}).to_bytes()
        for vouched in (None, hashlib.sha256(data).hexdigest()):
            with pytest.raises(SecurityRefused):
                Manifest.parse(data, "here", vouched)


def test_files_come_back_verified(stored: tuple[Store, Manifest], tmp_path: Path) -> None:
    store, manifest = stored
    download_files(store, manifest, tmp_path / "target")
    assert {path: (tmp_path / "target" / path).read_bytes() for path in list_files(tmp_path / "target")} == FILES
    assert manifest.total_bytes == sum(map(len, FILES.values()))


def test_what_comes_whole_is_hashed_once(
    stored: tuple[Store, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []

    def count(path: Path) -> str:
        hashed.append(path)
        return hash_file(path)

    monkeypatch.setattr("job.store.transfer.hash_file", count)
    download_files(*stored, tmp_path / "copy")
    assert len(hashed) == len(stored[1].files)


def test_only_the_wanted_files_come(stored: tuple[Store, Manifest], tmp_path: Path) -> None:
    store, manifest = stored
    download_files(store, manifest, tmp_path / "target", only=["config.json", "not in the set"])
    assert list_files(tmp_path / "target") == ["config.json"]


@pytest.mark.parametrize("path", [path for path, data in FILES.items() if data])
def test_a_flipped_bit_is_refused_naming_the_object(stored: tuple[Store, Manifest], tmp_path: Path, path: str) -> None:
    store, manifest = stored
    data = bytearray(FILES[path])
    data[-1] ^= 1
    store.write(f"sets/one/{path}", bytes(data))
    with pytest.raises(NoValidCheckpoint, match=f"sets/one/{path}: does not match") as caught:
        download_files(store, manifest, tmp_path / "target")
    assert caught.value.exit_code == 17
    assert path not in list_files(tmp_path / "target"), "nothing of the damaged object stays"
    assert not list((tmp_path / "target").rglob("*.partial"))
    (problem,) = verify_objects(store, manifest, tmp_path / "scratch")
    assert f"sets/one/{path}: size or sha256 differs" in problem


@pytest.mark.parametrize("data", [b"{", b"{} ", b""])
def test_an_object_of_another_size_is_refused(stored: tuple[Store, Manifest], tmp_path: Path, data: bytes) -> None:
    store, manifest = stored
    store.write("sets/one/config.json", data)
    with pytest.raises(NoValidCheckpoint, match=r"sets/one/config\.json: does not match"):
        download_files(store, manifest, tmp_path / "target")


def test_a_missing_object_is_refused_naming_it(stored: tuple[Store, Manifest], tmp_path: Path) -> None:
    store, manifest = stored
    store.delete(["sets/one/config.json"])
    with pytest.raises(NoValidCheckpoint, match=r"sets/one/config\.json: named by the manifest but missing"):
        download_files(store, manifest, tmp_path / "target")
    assert verify_objects(store, manifest, tmp_path / "scratch") == ["sets/one/config.json: missing (config.json)"]


def test_a_whole_set_verifies_without_a_word(stored: tuple[Store, Manifest], tmp_path: Path) -> None:
    assert verify_objects(*stored, tmp_path / "scratch") == []


def test_a_file_that_is_there_already_is_kept_and_a_wrong_one_replaced(
    stored: tuple[Store, Manifest], tmp_path: Path
) -> None:
    store, manifest = stored
    download_files(store, manifest, tmp_path / "target")
    (tmp_path / "target/config.json").write_bytes(b"[]")
    kept = (tmp_path / "target/onnx/model.onnx").stat()
    store.delete(["sets/one/onnx/model.onnx"])
    download_files(store, manifest, tmp_path / "target")
    assert (tmp_path / "target/config.json").read_bytes() == FILES["config.json"]
    assert (tmp_path / "target/onnx/model.onnx").stat().st_ino == kept.st_ino


def test_a_file_that_cannot_be_read_any_more_is_fetched_anew(
    stored: tuple[Store, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, manifest = stored
    download_files(store, manifest, tmp_path / "target")

    def fail_on_old(path: str | Path) -> str:
        if not str(path).endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return hash_file(path)

    monkeypatch.setattr("job.store.transfer.hash_file", fail_on_old)
    download_files(store, manifest, tmp_path / "target")
    assert {path: (tmp_path / "target" / path).read_bytes() for path in FILES} == FILES


def test_what_killed_downloads_left_is_removed_and_a_living_one_is_not(
    stored: tuple[Store, Manifest], tmp_path: Path
) -> None:
    store, manifest = stored
    (tmp_path / "target/onnx").mkdir(parents=True)
    left, living, other = (
        tmp_path / "target/onnx" / name
        for name in (f"model.onnx.{'0' * 32}.partial", f"model.onnx.{'1' * 32}.partial", "model.partial")
    )
    for path in (left, living, other):
        path.write_bytes(b"half")
    for path in (left, other):
        os.utime(path, (time.time() - 7200,) * 2)
    download_files(store, manifest, tmp_path / "target")
    assert [path.exists() for path in (left, living, other)] == [False, True, True]


def test_a_link_under_the_name_of_an_unfinished_download_leads_nothing_outside(
    stored: tuple[Store, Manifest], tmp_path: Path
) -> None:
    """Such names once had the number of the process alone, which who shares the folder can guess."""
    store, manifest = stored
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    target.mkdir()
    (target / f"config.json.{os.getpid()}.partial").symlink_to(outside / "config.json")
    download_files(store, manifest, target)
    assert list(outside.iterdir()) == []
    assert not (target / "config.json").is_symlink()


def test_a_symlink_in_the_target_leads_nothing_outside(stored: tuple[Store, Manifest], tmp_path: Path) -> None:
    store, manifest = stored
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    target.mkdir()
    (target / "deep").symlink_to(outside)
    (target / "empty").symlink_to(outside / "empty")
    for path in ("deep/er/é.txt", "empty"):
        with pytest.raises(SecurityRefused, match="would be written outside"):
            download_files(store, manifest, target, only=[path])
    assert list(outside.iterdir()) == []


class Crowd:
    """A store in which everything waits until `most` files move at the same time; `highest`: how many did."""

    uri = "crowd"

    def __init__(self, most: int) -> None:
        self._barrier, self._lock = Barrier(most, timeout=30), Lock()
        self._moving = self.highest = 0

    def upload(self, source: Path, key: str) -> None:
        with self._lock:
            self._moving += 1
            self.highest = max(self.highest, self._moving)
        self._barrier.wait()
        with self._lock:
            self._moving -= 1

    def download(self, key: str, path: Path, *, size: int) -> None:
        path.write_bytes(bytes(size))
        self.upload(path, key)


@pytest.mark.parametrize(("size", "most"), [(1 << 20, 16), ((1 << 20) + 1, 4)], ids=["small", "large"])
def test_many_small_files_move_at_a_time_or_few_large_ones(tmp_path: Path, size: int, most: int) -> None:
    for number in range(2 * most):
        (tmp_path / f"{number}").write_bytes(bytes(size))
    entries = describe_files(tmp_path, list_files(tmp_path), "set")
    up, down = Crowd(most), Crowd(most)
    upload_files(cast(Store, up), tmp_path, entries)
    download_files(cast(Store, down), Manifest("release", entries), tmp_path / "target")
    assert (up.highest, down.highest) == (most, most)


def test_a_set_larger_than_the_disk_is_refused_before_the_first_byte(tmp_path: Path) -> None:
    manifest = Manifest("release", {"model": ManifestEntry(1 << 60, "0" * 64, "model")})
    with pytest.raises(ResourceExhausted, match="do not fit") as caught:
        download_files(open_store(str(tmp_path / "store")), manifest, tmp_path / "target")
    assert caught.value.exit_code == 78
    assert list_files(tmp_path / "target") == []


def test_what_lies_here_already_needs_no_more_of_a_full_disk(
    stored: tuple[Store, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, manifest = stored
    download_files(store, manifest, tmp_path / "target")
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr("job.store.transfer.shutil.disk_usage", lambda _: full)
    download_files(store, manifest, tmp_path / "target")
    (tmp_path / "target/onnx/model.onnx").unlink()
    with pytest.raises(ResourceExhausted, match="do not fit"):
        download_files(store, manifest, tmp_path / "target")


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_disk_that_fills_up_meanwhile_is_78_and_not_a_damaged_checkpoint(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    root = str(tmp_path / "store") if kind == "folder" else f"{request.getfixturevalue('s3')}/disk-full"
    open_store(root).write("model", bytes(300_000))
    limited = tmp_path / "limited.py"
    limited.write_text(PROGRAM)
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))}
    command = [sys.executable, str(limited), root, str(tmp_path / "target")]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ, **limit)  # type: ignore[call-overload]
    assert run.stdout.split() == ["78", "[]"], run.stderr


PROGRAM = """
import hashlib, sys
from pathlib import Path
from job.errors import JobError
from job.store import Manifest, ManifestEntry, open_store
from job.store.transfer import download_files
digest = hashlib.sha256(bytes(300_000)).hexdigest()
try:
    manifest = Manifest("release", {"model": ManifestEntry(300_000, digest, "model")})
    download_files(open_store(sys.argv[1]), manifest, Path(sys.argv[2]))
except JobError as error:
    print(error.exit_code, list(Path(sys.argv[2]).iterdir()))
"""


def test_the_first_error_of_a_parallel_upload_is_raised(stored: tuple[Store, Manifest], tmp_path: Path) -> None:
    store, _ = stored
    with pytest.raises(JobError):
        upload_files(store, tmp_path, {"absent": ManifestEntry(1, "0" * 64, "absent")})
