"""A proxy before a real S3 server refuses, drops and cuts answers: nothing is lost, and no byte is wrong."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from urllib.parse import urlsplit

import pytest
from fault_proxy import Fault, FaultProxy, bad_network, first, serve_faults

from job.errors import AccessDenied, JobError, RecipeError, Unreachable
from job.node import Node
from job.recipe import Recipe, Run
from job.releasing import _prune
from job.store import Attempt, RunStore, Store, open_store
from job.store.checkpoints import CheckpointWriter
from job.store.commit import move_pointer, read_pointer
from job.store.held import HeldFile
from job.store.manifest import Manifest, ManifestEntry
from job.store.objects import PreconditionFailed
from job.store.probe import probe_conditional_writes
from job.store.records import dump
from job.store.restore import fetch_checkpoint

Through = Callable[[Fault], tuple[str, FaultProxy]]


@pytest.fixture
def through_proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Through]:
    """Put a proxy with the given faults before the server; returns an unused URI and the proxy."""
    monkeypatch.setattr(time, "sleep", lambda _: None)  # back-off is botocore's affair; here it only costs time
    with serve_faults(urlsplit(os.environ["AWS_ENDPOINT_URL_S3"]).netloc) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)

        def start(fault: Fault) -> tuple[str, FaultProxy]:
            proxy.fault = fault
            return f"{s3}/{uuid.uuid4().hex}", proxy

        yield start


@pytest.mark.parametrize("kind", ["503", "reset"])
def test_more_refusals_than_botocore_bears_are_waited_out(through_proxy: Through, tmp_path: Path, kind: str) -> None:
    (tmp_path / "source").write_bytes(b"file")
    uri, proxy = through_proxy(first(12, kind, "PUT"))
    store = open_store(uri)
    store.upload(tmp_path / "source", "file")
    proxy.fault = first(12, kind, "GET")
    found = store.read("file")
    assert found is not None
    assert found.data == b"file"
    assert proxy.count[kind] == 24


def test_refusals_without_end_are_77_naming_the_answer(
    through_proxy: Through, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.0)
    (tmp_path / "source").write_bytes(b"file")
    store = open_store(through_proxy(lambda request: "503")[0])
    for call in (lambda: store.upload(tmp_path / "source", "a"), lambda: store.read("a"), lambda: list(store.list(""))):
        with pytest.raises(Unreachable, match=r"503|SlowDown") as caught:
            call()
        assert caught.value.exit_code == 77


@pytest.mark.parametrize("is_told", [True, False], ids=["size known", "size unknown"])
@pytest.mark.parametrize("size", [1000, 20 << 20], ids=["small", "parts"])
def test_a_cut_answer_is_asked_for_again(through_proxy: Through, tmp_path: Path, size: int, is_told: bool) -> None:
    uri, proxy = through_proxy(first(3, "cut", "GET"))
    store, data = open_store(uri), random.Random(size).randbytes(size)
    (tmp_path / "source").write_bytes(data)
    store.upload(tmp_path / "source", "file")
    found = store.read("file")
    assert found is not None
    assert found.data == data
    proxy.fault = first(3, "cut", "GET")
    store.download("file", tmp_path / "target", size=size if is_told else None)
    assert (tmp_path / "target").read_bytes() == data
    assert proxy.count["cut"] == 6


@pytest.mark.parametrize("kind", ["503", "reset"])
@pytest.mark.parametrize("size", [5 << 20, 40 << 20], ids=["part", "parts"])
def test_a_file_that_leaves_its_memory_while_it_is_sent_arrives_whole(
    through_proxy: Through, tmp_path: Path, kind: str, size: int
) -> None:
    data, puts = random.Random(size).randbytes(size), []
    memory = bytearray(data)
    held = HeldFile([memoryview(memory)[: size // 3], memoryview(memory)[size // 3 :]], tmp_path / "held")
    uri, proxy = through_proxy(lambda request: "")
    again = first(6, kind, "PUT")

    def refuse(request: str) -> str:
        puts.append(request)
        if len(puts) == 4:
            held.move_to_disk()
            memory[:] = bytes(size)  # the next checkpoint takes its place
        return again(request)

    store = open_store(uri)
    proxy.fault = refuse
    store.upload(held, "file")
    store.download("file", tmp_path / "target")
    assert len(puts) > 6
    assert (tmp_path / "target").read_bytes() == data
    assert held.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("standing", [True, False])
def test_a_pointer_whose_answer_was_lost_is_ones_own(through_proxy: Through, standing: bool) -> None:
    uri, proxy = through_proxy(lambda request: "")
    store = open_store(uri)
    etag = move_pointer(store, {"epoch": 1, "nonce": "before", "attempt": "a"}, None) if standing else None
    proxy.fault = first(1, "lost", "PUT")
    etag = move_pointer(store, {"epoch": 1, "nonce": "mine", "attempt": "a"}, etag)
    assert proxy.count["lost"] == 1
    assert move_pointer(store, {"epoch": 1, "nonce": "next", "attempt": "a"}, etag)


@pytest.mark.parametrize("seed", range(4))
def test_checkpoints_through_a_bad_network_are_whole(through_proxy: Through, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    uri, proxy = through_proxy(bad_network(seed))
    store = RunStore(uri, "run-1")
    attempt = {"epoch": 1, "nonce": "0123456789abcdef", "keep": 2, "peer_timeout_s": 60}
    store.write_json("owner.json", {"nonce": attempt["nonce"]})
    writer = CheckpointWriter(store, 0, 1, attempt)
    for step in range(1, 6):
        folder = tmp_path / f"step{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(chance.randbytes(50_000))
        (folder / "state.json").write_text(str(step))
        writer.commit(folder, step, {})
        pointer = read_pointer(store.objects)
        assert pointer is not None
        assert pointer["step"] == step
        fetch_checkpoint(store.objects, pointer["manifest"], pointer["manifest_sha256"], tmp_path / f"fetched{step}")
        for path in folder.iterdir():
            assert (tmp_path / f"fetched{step}" / path.name).read_bytes() == path.read_bytes()
    assert sum(number for kind, number in proxy.count.items() if kind) > 5


def test_a_conflict_is_tried_again_until_it_is_over(through_proxy: Through) -> None:
    uri, proxy = through_proxy(first(9, "409", "PUT"))
    store = open_store(uri)
    store.write("pointer", b"1", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.write("pointer", b"2", if_absent=True)
    assert proxy.count["409"] == 9


REFUSALS = [
    ("403", AccessDenied, r"AccessDenied|403; check the credentials"),
    ("expired", AccessDenied, r"ExpiredToken|403; check the credentials"),
    ("skew", AccessDenied, r"clock is -(3599|3600) s off; set it \(chrony, NTP\)"),
    ("301", RecipeError, "check AWS_REGION and AWS_ENDPOINT_URL_S3"),
    ("500", Unreachable, "InternalError|500"),
    ("501", RecipeError, r"does not implement this.*store\.single_writer: true"),
]


@pytest.mark.parametrize(("kind", "error", "words"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_what_a_server_refuses_has_its_own_code_and_next_step(
    through_proxy: Through, monkeypatch: pytest.MonkeyPatch, kind: str, error: type[JobError], words: str
) -> None:
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.0)
    store = open_store(through_proxy(lambda request: kind)[0])
    for call in (lambda: store.read("a"), lambda: store.write("a", b""), lambda: list(store.list(""))):
        with pytest.raises(error, match=words):
            call()


def test_a_bucket_that_redirects_to_nowhere_is_asked_for_its_region_once(through_proxy: Through) -> None:
    uri, proxy = through_proxy(lambda request: "301")
    with pytest.raises(RecipeError, match="AWS_REGION"):
        open_store(uri).read("a")
    assert [request.method for request in proxy.seen] == ["GET", "HEAD"]


def test_credentials_that_expire_after_they_worked_are_waited_for_then_77(
    through_proxy: Through, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, proxy = through_proxy(lambda request: "")
    store = open_store(uri)
    store.write("a", b"1")
    proxy.fault = first(3, "expired")
    assert store.read("a") is not None, "new credentials came"
    assert proxy.count["expired"] == 3
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.0)
    proxy.fault = lambda request: "expired"
    with pytest.raises(Unreachable, match="the credentials expired and no new ones came"):
        store.read("a")


HALF_WRITTEN = {"empty": "", "without a secret": "[default]\naws_access_key_id = k\n", "cut": "[defau"}


@pytest.fixture
def keys(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that has the credentials, which nothing else has."""
    path = tmp_path / "credentials"
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    path.write_text("".join(["[default]\n", *(f"{name.lower()} = {os.environ[name]}\n" for name in names)]))
    for name in names:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return path


@pytest.mark.parametrize("half", HALF_WRITTEN.values(), ids=HALF_WRITTEN)
def test_credentials_that_are_being_written_when_they_are_needed_are_read_again(
    keys: Path, through_proxy: Through, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, proxy = through_proxy(lambda request: "")
    store, whole = open_store(uri), keys.read_text()
    store.write("a", b"1")
    keys.write_text(half)
    monkeypatch.setattr(time, "sleep", lambda _: keys.write_text(whole))  # between two tries
    proxy.fault = first(1, "expired")
    assert store.read("a") is not None
    assert proxy.count["expired"] == 1


def test_credentials_that_are_gone_after_they_worked_are_waited_for_then_77(
    keys: Path, through_proxy: Through, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, proxy = through_proxy(lambda request: "")
    store = open_store(uri)
    store.write("a", b"1")
    keys.write_text("")
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 1.0)
    proxy.fault = first(1, "expired")
    with pytest.raises(Unreachable, match="no new ones came"):
        store.read("a")
    with pytest.raises(AccessDenied, match="no credentials"):
        open_store(uri).read("a")


def test_a_server_that_never_answers_is_given_up_after_the_deadline(
    through_proxy: Through, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("READ_TIMEOUT_S", "DEADLINE_S"):
        monkeypatch.setattr(f"job.store.s3.{name}", 0.3)
    store = open_store(through_proxy(lambda request: "hole")[0])
    with pytest.raises(Unreachable, match="Read timeout"):
        store.read("a")


@pytest.mark.parametrize("kind", ["400", "501"])
def test_a_server_that_deletes_only_one_object_at_a_time_is_asked_so(through_proxy: Through, kind: str) -> None:
    """Older ones want an MD5 that boto3 no longer sends with a list of keys, others never had the call."""
    uri, _ = through_proxy(lambda request: kind if request.method == "POST" else "")
    store = open_store(uri)
    for key in ("a", "b", "c"):
        store.write(key, b"")
    store.delete(["a", "b", "absent"])
    assert [item.key for item in store.list("")] == ["c"]


def test_a_server_that_drops_the_conditions_is_refused_by_the_probe(through_proxy: Through) -> None:
    uri, _ = through_proxy(lambda request: "strip")
    with pytest.raises(RecipeError, match=r"ignores If-None-Match.*store\.single_writer: true"):
        probe_conditional_writes(open_store(uri))
    assert list(open_store(uri).list("")) == []


def test_job_release_moves_a_pointer_by_hand_where_the_server_knows_no_conditions(through_proxy: Through) -> None:
    conditions = {"if-match", "if-none-match"}
    uri, _ = through_proxy(lambda request: "501" if conditions & {name.lower() for name in request.headers} else "")
    objects = open_store(f"{uri}/models/tiny")
    for version in "ab":
        entry = {"config.json": ManifestEntry(2, "0" * 64, "config.json")}
        objects.write(f"{version}/config.json", b"{}")
        objects.write(f"{version}/manifest.json", Manifest("release", entry).to_bytes())
    command = [sys.executable, "-m", "job", "release", "promote", f"{uri}/models/tiny"]
    refused = subprocess.run([*command, "a"], capture_output=True, text=True)
    assert refused.returncode == RecipeError.exit_code
    assert "--single-writer" in refused.stderr
    for version in "ab":
        assert subprocess.run([*command, version, "--single-writer"]).returncode == 0
    rolled = subprocess.run([*command[:4], "rollback", command[5], "--single-writer"], capture_output=True, text=True)
    assert rolled.stdout == "current: a\n", rolled.stderr


def release_twice(uri: str) -> Store:
    """Leave two releases of a model, and the runs that made them; return the store."""
    objects, entry = open_store(uri), {"config.json": ManifestEntry(2, "0" * 64, "config.json")}
    for night in (1, 2):
        version, about = f"tiny-{night}-0000000{night}", {"order": night}
        objects.write(f"models/tiny/{version}/manifest.json", Manifest("release", entry, about).to_bytes())
        record = {"record": {"release": f"{uri}/models/tiny/{version}"}}
        objects.write(f"runs/tiny-{night}/stages/release.json", dump(record))
    return objects


NO_CONDITIONS = {"if-match", "if-none-match"}


@pytest.mark.parametrize("fault", ["501", "strip"])
def test_job_release_prune_deletes_nothing_where_the_server_knows_no_conditions_unless_told(
    through_proxy: Through, fault: str
) -> None:
    uri, _ = through_proxy(lambda request: fault if NO_CONDITIONS & {name.lower() for name in request.headers} else "")
    objects = release_twice(uri)
    before = {item.key for item in objects.list("")}
    command = [sys.executable, "-m", "job", "release", "prune", f"{uri}/models/tiny", "--keep", "1"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == RecipeError.exit_code, refused.stderr
    assert "--single-writer" in refused.stderr
    assert {item.key for item in objects.list("")} == before
    done = subprocess.run([*command, "--single-writer"], capture_output=True, text=True)
    assert done.stdout == "deleted release tiny-1-00000001\ndeleted run tiny-1\n", done.stderr
    assert {item.key for item in objects.list("")} == {key for key in before if "tiny-1" not in key}


def test_a_run_with_store_single_writer_prunes_where_the_server_knows_no_conditions(
    through_proxy: Through, smallest_recipe: Recipe, tmp_path: Path
) -> None:
    uri, _ = through_proxy(lambda request: "501" if NO_CONDITIONS & {name.lower() for name in request.headers} else "")
    objects = release_twice(uri)
    store = smallest_recipe.store.model_copy(update={"uri": uri, "single_writer": True, "keep_releases": 1})
    run = Run("tiny-2", smallest_recipe.model_copy(update={"name": "tiny", "store": store}), tmp_path)
    node = cast(Node, SimpleNamespace(transfer=lambda work: work()))
    _prune(node, run, cast(Attempt, SimpleNamespace(verify=lambda: None)), "tiny-2-00000002")
    assert {item.key for item in objects.list("")} == {
        "models/tiny/tiny-2-00000002/manifest.json", "runs/tiny-2/stages/release.json"
    }  # fmt: skip


def test_no_request_to_a_server_of_ones_own_has_a_checksum_trailer(through_proxy: Through, tmp_path: Path) -> None:
    """Such servers answer 501 to them (or store them as data); our own sha256 stands in the manifest."""
    (tmp_path / "source").write_bytes(b"x" * (17 << 20))
    uri, proxy = through_proxy(lambda request: "")
    store = open_store(uri)
    store.write("a", b"1", if_absent=True)
    store.upload(tmp_path / "source", "b")
    assert len(proxy.seen) >= 5
    assert not {
        name for request in proxy.seen for name in request.headers if "trailer" in name or "x-amz-checksum" in name
    }


def test_a_process_that_was_forked_during_a_write_does_not_keep_the_store_locked(tmp_path: Path) -> None:
    """As a loader of the next epoch is, while the last one's checkpoint is on its way."""
    store = open_store(str(tmp_path / "store"))
    file = tmp_path / "file"
    file.write_bytes(b"1")
    loaders = []

    def fork() -> None:
        loaders.append(os.fork())
        if not loaders[-1]:
            time.sleep(30)
            os._exit(0)

    store._place(store._path("one"), lambda path: path.write_bytes(b"1"), check=fork)  # type: ignore[attr-defined]
    try:
        began = time.monotonic()
        store.upload(file, "two")
        assert time.monotonic() - began < 20, "not when the other process ends"
    finally:
        os.kill(loaders[0], signal.SIGKILL)
        os.waitpid(loaders[0], 0)
