"""The commit protocol: a pointer never names what cannot be verified, whoever is killed, late or fenced."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from job.errors import (
    AccessDenied,
    CheckpointMismatch,
    Fenced,
    JobError,
    NotFound,
    NoValidCheckpoint,
    PeerLost,
    SecurityRefused,
    Unreachable,
)
from job.store import RunStore, Store, latest_release, open_store, promote_release, publish_release
from job.store.background import BackgroundUploader
from job.store.commit import CheckpointWriter, move_pointer, read_release_manifest
from job.store.folder import FolderStore
from job.store.manifest import list_files
from job.store.objects import Blob, ObjectInfo, PreconditionFailed

Hook = Callable[[str, str], None]

ATTEMPT = {"epoch": 1, "nonce": "0123456789abcdef", "keep": 2, "peer_timeout_s": 60.0}


class WatchedStore:
    """A store that calls `before` each change with (method, key) and `after` it, and otherwise is the one inside."""

    def __init__(self, inside: Store, before: Hook = lambda *_: None, after: Hook = lambda *_: None) -> None:
        self._inside, self.uri = inside, inside.uri
        self._before, self._after = before, after
        self._lock = threading.Lock()

    def read(self, key: str) -> Blob | None:
        return self._inside.read(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._inside.list(prefix)

    def download(self, key: str, path: Path) -> None:
        self._inside.download(key, path)

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        with self._lock:
            self._before("write", key)
            etag = self._inside.write(key, data, if_absent=if_absent, if_match=if_match)
            self._after("write", key)
            return etag

    def upload(self, path: Path, key: str) -> None:
        with self._lock:
            self._before("upload", key)
            self._inside.upload(path, key)
            self._after("upload", key)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            with self._lock:
                self._before("delete", key)
                self._inside.delete([key])
                self._after("delete", key)


@pytest.fixture(params=["folder", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of each kind, without anything in it."""
    return str(tmp_path / "store") if request.param == "folder" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "store"), "run-1")


def make_checkpoint(folder: Path, rank: int, step: int) -> Path:
    """What one rank leaves on its disk: a shard of its own; rank 0 also the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"optimizer-{rank}.safetensors").write_bytes(b"%d-%d" % (rank, step) * 50)
    if rank == 0:
        (folder / "model.safetensors").write_bytes(b"weights %d" % step)
    return folder


def commit(writer: CheckpointWriter, place: Path, rank: int, step: int) -> None:
    writer.commit(make_checkpoint(place / f"rank{rank}-step{step}", rank, step), step, {"world_size": 2})


def commit_alone(store: RunStore, place: Path, *steps: int, **attempt: Any) -> CheckpointWriter:
    writer = CheckpointWriter(store, 0, 1, ATTEMPT | attempt)
    for step in steps:
        commit(writer, place, 0, step)
    return writer


def verify_current(store: RunStore, scratch: Path) -> int | None:
    """Fetch and verify everything that current.json names; return its step, None before the first commit."""
    pointer = store.current_checkpoint()
    if pointer is None:
        return None
    store.fetch_checkpoint(pointer, scratch / pointer["nonce"], lambda path: True)
    return int(pointer["step"])


def committed_steps(store: RunStore) -> list[int]:
    keys = [item.key for item in store.objects.list("checkpoints/") if item.key.endswith("/manifest.json")]
    return sorted(int(key.split("-s")[1][:8]) for key in keys)


# --- checkpoints


def test_two_ranks_commit_checkpoints_that_hold_the_files_of_both(base: str, tmp_path: Path) -> None:
    store = RunStore(base, "run-1")

    def train(rank: int) -> None:
        writer = CheckpointWriter(RunStore(base, "run-1"), rank, 2, ATTEMPT)
        for step in (10, 20, 30):
            commit(writer, tmp_path, rank, step)

    ranks = [threading.Thread(target=train, args=(rank,)) for rank in (1, 0)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    pointer = store.current_checkpoint()
    assert pointer is not None
    manifest = store.fetch_checkpoint(pointer, tmp_path / "fetched", lambda path: True)
    assert set(manifest.files) == {"model.safetensors", "optimizer-0.safetensors", "optimizer-1.safetensors"}
    assert list_files(tmp_path / "fetched") == sorted(manifest.files)
    assert manifest.about == {"world_size": 2, "step": 30, "epoch": 1}
    assert committed_steps(store) == [20, 30]


def test_a_rank_fetches_only_its_own_files(run: RunStore, tmp_path: Path) -> None:
    commit_alone(run, tmp_path, 10)
    pointer = run.current_checkpoint()
    assert pointer is not None
    run.fetch_checkpoint(pointer, tmp_path / "fetched", lambda path: path.startswith("model"))
    assert list_files(tmp_path / "fetched") == ["model.safetensors"]


def test_whatever_the_store_holds_at_any_moment_the_pointer_verifies(run: RunStore, tmp_path: Path) -> None:
    plain, seen = RunStore(str(tmp_path / "store"), "run-1"), set()
    run.objects = WatchedStore(run.objects, after=lambda *_: seen.add(verify_current(plain, tmp_path / "scratch")))
    commit_alone(run, tmp_path, 10, 20, 30, 40)
    assert seen == {None, 10, 20, 30, 40}


def count_changes(tmp_path: Path) -> int:
    changes: list[str] = []
    store = RunStore(str(tmp_path / "counted"), "run-1")
    store.objects = WatchedStore(store.objects, before=lambda *change: changes.append(" ".join(change)))
    commit_alone(store, tmp_path / "counted-files", 10, 20, 30, 40)
    return len(changes)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_any_change_loses_no_committed_checkpoint(tmp_path: Path, when: str) -> None:
    class Killed(BaseException):
        """Nothing in the code under test can catch it, as nothing can catch SIGKILL."""

    total = count_changes(tmp_path)
    assert total > 20
    for fatal in range(total):
        place = tmp_path / str(fatal)
        store, plain = RunStore(str(place / "store"), "run-1"), RunStore(str(place / "store"), "run-1")
        changes = iter(range(total))

        def die(*_: str, fatal: int = fatal, changes: Iterator[int] = changes) -> None:
            if next(changes) == fatal:
                raise Killed

        store.objects = WatchedStore(store.objects, **{when: die})
        with pytest.raises(Killed):
            commit_alone(store, place, 10, 20, 30, 40)
        found = verify_current(plain, place / "scratch") or 0
        commit_alone(plain, place, found + 10, epoch=plain.next_epoch(), nonce="f" * 16)
        assert verify_current(plain, place / "scratch") == found + 10


def test_the_last_k_checkpoints_stay_and_nothing_of_the_others(run: RunStore, tmp_path: Path) -> None:
    commit_alone(run, tmp_path, 10, 20, 30, 40, 50, keep=3)
    assert committed_steps(run) == [30, 40, 50]
    folders = {item.key.split("/")[1] for item in run.objects.list("checkpoints/")}
    assert len(folders) == 3


def test_retention_leaves_what_another_attempt_wrote(run: RunStore, tmp_path: Path) -> None:
    commit_alone(run, tmp_path, 10, 20)
    commit_alone(run, tmp_path, 30, 40, 50, epoch=2, nonce="f" * 16)
    assert committed_steps(run) == [10, 20, 40, 50]


def test_a_checkpoint_that_cannot_be_deleted_does_not_stop_the_run(
    run: RunStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(method: str, key: str) -> None:
        if method == "delete":
            raise AccessDenied(f"cannot delete {key}: 403")

    run.objects = WatchedStore(run.objects, before=refuse)
    commit_alone(run, tmp_path, 10, 20, 30)
    assert verify_current(run, tmp_path / "scratch") == 30
    assert "403" in caplog.text


def test_a_write_whose_answer_was_lost_counts_as_written(run: RunStore, tmp_path: Path) -> None:
    writes = []

    def lose_the_first_answer(method: str, key: str) -> None:
        if key == "current.json":
            writes.append(key)
            if len(writes) == 1:
                raise PreconditionFailed("412, and yet it was written")

    run.objects = WatchedStore(run.objects, after=lose_the_first_answer)
    writer = commit_alone(run, tmp_path, 10)
    assert len(writes) == 1, "recognized by its nonce, not written again"
    assert verify_current(run, tmp_path / "scratch") == 10
    commit(writer, tmp_path, 0, 20)
    assert len(writes) == 2
    assert verify_current(run, tmp_path / "scratch") == 20


@pytest.mark.parametrize("committed_before", [True, False])
def test_an_attempt_that_was_overtaken_is_fenced_and_changes_nothing(
    run: RunStore, tmp_path: Path, committed_before: bool
) -> None:
    zombie = commit_alone(run, tmp_path, *([10] if committed_before else []))
    commit_alone(run, tmp_path, 20, epoch=2, nonce="f" * 16)
    standing = run.current_checkpoint()
    for step in (30, 40):
        with pytest.raises(Fenced) as caught:
            commit(zombie, tmp_path, 0, step)
        assert caught.value.exit_code == 76
    assert run.current_checkpoint() == standing


@pytest.mark.parametrize("committed_before", [True, False])
def test_an_attempt_that_is_overtaken_in_the_very_swap_is_fenced(
    run: RunStore, tmp_path: Path, committed_before: bool
) -> None:
    plain, newer = RunStore(str(tmp_path / "store"), "run-1"), {"epoch": 9, "nonce": "of the newer attempt"}
    if committed_before:
        commit_alone(plain, tmp_path, 10)

    def overtake(method: str, key: str) -> None:
        if key == "current.json":
            plain.write_json("current.json", newer)

    run.objects = WatchedStore(run.objects, before=overtake)
    with pytest.raises(Fenced):
        commit_alone(run, tmp_path, 20)
    assert plain.current_checkpoint() == newer


def test_a_newer_attempt_takes_over_from_an_older_one(run: RunStore, tmp_path: Path) -> None:
    assert run.next_epoch() == 1
    commit_alone(run, tmp_path, 10)
    assert run.next_epoch() == 2
    commit_alone(run, tmp_path, 20, epoch=2, nonce="f" * 16)
    assert verify_current(run, tmp_path / "scratch") == 20
    assert run.next_epoch() == 3


def test_of_many_attempts_at_once_the_highest_epoch_stands(run: RunStore, tmp_path: Path) -> None:
    ready, fenced = threading.Barrier(6), []

    def attempt(epoch: int) -> None:
        own = RunStore(str(tmp_path / "store"), "run-1")
        ready.wait()
        try:
            commit_alone(own, tmp_path / str(epoch), 10, 20, epoch=epoch, nonce=f"{epoch:016d}")
        except Fenced:
            fenced.append(epoch)

    attempts = [threading.Thread(target=attempt, args=(epoch,)) for epoch in range(1, 7)]
    for thread in attempts:
        thread.start()
    for thread in attempts:
        thread.join()
    pointer = run.current_checkpoint()
    assert pointer is not None
    assert (pointer["epoch"], pointer["step"]) == (6, 20)
    assert 6 not in fenced


def test_a_rank_that_never_uploads_is_named_after_the_deadline(run: RunStore, tmp_path: Path) -> None:
    writer = CheckpointWriter(run, 0, 2, ATTEMPT | {"peer_timeout_s": 0.1})
    with pytest.raises(PeerLost, match=r"rank 1 did not upload its part of checkpoints/e0001-s00000010") as caught:
        commit(writer, tmp_path, 0, 10)
    assert caught.value.exit_code == 79
    assert run.current_checkpoint() is None


def test_a_step_that_a_slow_rank_skipped_is_skipped_by_all(run: RunStore, tmp_path: Path) -> None:
    first, second = (CheckpointWriter(run, rank, 2, ATTEMPT) for rank in (0, 1))
    commit(second, tmp_path, 1, 20)
    commit(first, tmp_path, 0, 10)
    assert run.current_checkpoint() is None
    commit(first, tmp_path, 0, 20)
    assert verify_current(run, tmp_path / "scratch") == 20
    assert {item.key.split("/")[1][:15] for item in run.objects.list("checkpoints/")} == {"e0001-s00000020"}


DAMAGED_POINTERS = [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000]
INCOMPLETE_POINTERS = [
    {}, {"manifest": None}, {"manifest": 7, "manifest_sha256": []}, {"manifest": "checkpoints/gone/manifest.json"},
    {"manifest": "stages/train.json", "manifest_sha256": "0" * 64},
]  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED_POINTERS, ids=lambda data: ascii(data[:10]))
def test_a_damaged_pointer_is_17_and_the_next_commit_replaces_it(run: RunStore, tmp_path: Path, data: bytes) -> None:
    run.objects.write("current.json", data)
    with pytest.raises(NoValidCheckpoint, match=r"current\.json: not a JSON object"):
        run.current_checkpoint()
    commit_alone(run, tmp_path, 10, epoch=run.next_epoch())
    assert verify_current(run, tmp_path / "scratch") == 10


@pytest.mark.parametrize("pointer", INCOMPLETE_POINTERS, ids=str)
def test_a_pointer_to_nothing_is_17(run: RunStore, tmp_path: Path, pointer: dict[str, Any]) -> None:
    run.write_json("stages/train.json", {"kind": "no manifest"})
    with pytest.raises(NoValidCheckpoint):
        run.fetch_checkpoint(pointer, tmp_path / "fetched", lambda path: True)


def test_a_pointer_that_leads_out_of_the_run_is_refused(run: RunStore, tmp_path: Path) -> None:
    with pytest.raises(SecurityRefused):
        run.fetch_checkpoint({"manifest": "../../other/manifest.json"}, tmp_path / "fetched", lambda path: True)


def test_another_manifest_under_the_same_key_is_17(run: RunStore, tmp_path: Path) -> None:
    commit_alone(run, tmp_path, 10)
    pointer = run.current_checkpoint()
    assert pointer is not None
    manifest = run.read_json(pointer["manifest"])
    assert manifest is not None
    run.write_json(pointer["manifest"], manifest | {"about": {"step": 11}})
    with pytest.raises(NoValidCheckpoint, match=r"is not what current\.json names"):
        run.fetch_checkpoint(pointer, tmp_path / "fetched", lambda path: True)


# --- records


def test_the_first_record_written_once_stays(base: str) -> None:
    store = RunStore(base, "run-1")
    assert store.write_once("run.json", {"recipe": 1}) == {"recipe": 1}
    assert store.write_once("run.json", {"recipe": 2}) == {"recipe": 1}
    store.write_json("status.json", {"phase": "train"})
    store.write_json("status.json", {"phase": "export"})
    assert store.read_json("status.json") == {"phase": "export"}
    assert store.read_json("absent.json") is None


def test_a_missing_bucket_is_noticed_before_the_run_begins(s3: str) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        RunStore(f"{s3}-which-is-not-there", "run-1").prove_reachable()
    RunStore(s3, "run-1").prove_reachable()


# --- releases


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "onnx/model.onnx").write_bytes(b"onnx")
    return folder


def test_a_release_is_found_by_its_model_once_it_is_promoted(base: str, bundle: Path) -> None:
    model = f"{base}/models/tiny"
    first = publish_release(base, "tiny", "run-1", bundle)
    assert latest_release(model) == model, "nothing is promoted yet"
    promote_release(base, "tiny", first)
    assert latest_release(model) == latest_release(f"{model}/") == f"{model}/{first}"
    (bundle / "config.json").write_text('{"changed": true}')
    second = publish_release(base, "tiny", "run-2", bundle)
    assert latest_release(model) == f"{model}/{first}"
    promote_release(base, "tiny", second)
    assert latest_release(model) == f"{model}/{second}"
    promote_release(base, "tiny", first)
    assert latest_release(model) == f"{model}/{first}", "a rollback is a promotion"
    for version in (first, second):
        assert latest_release(f"{model}/{version}") == f"{model}/{version}"
        store, manifest = read_release_manifest(f"{model}/{version}")
        assert version.endswith(manifest.sha256[:8])
        assert set(manifest.files) == {"config.json", "onnx/model.onnx"}
        assert all(store.read(entry.key) for entry in manifest.files.values())


def test_the_same_bundle_published_again_is_the_same_release(base: str, bundle: Path) -> None:
    version = publish_release(base, "tiny", "run-1", bundle)
    stored = open_store(f"{base}/models/tiny/{version}").read("manifest.json")
    assert publish_release(base, "tiny", "run-1", bundle) == version
    assert open_store(f"{base}/models/tiny/{version}").read("manifest.json") == stored
    assert stored is not None
    assert stored.data == (bundle / "manifest.json").read_bytes()


def test_a_release_without_its_manifest_does_not_exist(base: str, bundle: Path) -> None:
    version = publish_release(base, "tiny", "run-1", bundle)
    uri = f"{base}/models/tiny/{version}"
    open_store(uri).delete(["manifest.json"])
    with pytest.raises(NotFound, match=r"manifest\.json: no such object"):
        read_release_manifest(uri)


def test_a_checkpoint_is_verified_like_a_release(run: RunStore, tmp_path: Path) -> None:
    commit_alone(run, tmp_path, 10)
    pointer = run.current_checkpoint()
    assert pointer is not None
    store, manifest = read_release_manifest(f"{run.uri}/{pointer['manifest'].removesuffix('/manifest.json')}")
    assert all(store.read(entry.key) for entry in manifest.files.values())


def test_a_run_is_no_model(run: RunStore, tmp_path: Path) -> None:
    commit_alone(run, tmp_path, 10)
    with pytest.raises(CheckpointMismatch, match="is a run, not a model"):
        latest_release(run.uri)


@pytest.mark.parametrize("version", ["../../other", "/etc", "a\\b", ""])
def test_a_pointer_to_a_hostile_version_is_refused(tmp_path: Path, version: str) -> None:
    store = open_store(str(tmp_path / "models/tiny"))
    store.write("current.json", json.dumps({"version": version}).encode())
    with pytest.raises(SecurityRefused):
        latest_release(str(tmp_path / "models/tiny"))


def test_a_damaged_model_pointer_is_17_and_a_promotion_mends_it(tmp_path: Path, bundle: Path) -> None:
    base = str(tmp_path / "store")
    version = publish_release(base, "tiny", "run-1", bundle)
    FolderStore(tmp_path / "store/models/tiny").write("current.json", b"{")
    with pytest.raises(NoValidCheckpoint):
        latest_release(f"{base}/models/tiny")
    promote_release(base, "tiny", version)
    assert latest_release(f"{base}/models/tiny").endswith(version)


@pytest.mark.parametrize("epoch", [None, "7", 1.5, [], {}])
def test_a_pointer_whose_epoch_is_no_number_fences_nobody(run: RunStore, epoch: object) -> None:
    run.write_json("current.json", {"epoch": epoch, "nonce": "x"})
    move_pointer(run.objects, {"epoch": 1, "nonce": "y"}, None)
    assert run.read_json("current.json") == {"epoch": 1, "nonce": "y"}


# --- upload beside the training


def test_while_one_upload_runs_the_newest_waits_and_the_others_are_dropped(tmp_path: Path) -> None:
    started, go_on, uploaded, dropped = threading.Event(), threading.Event(), [], []

    def upload(folder: Path) -> None:
        started.set()
        go_on.wait()
        uploaded.append(folder.name)

    uploader = BackgroundUploader(upload, lambda folder: dropped.append(folder.name), 60)
    uploader.submit(tmp_path / "1")
    started.wait()
    for name in ("2", "3", "4"):
        uploader.submit(tmp_path / name)
    go_on.set()
    uploader.close()
    assert (uploaded, dropped) == (["1", "4"], ["2", "3"])


def test_closing_waits_for_what_was_submitted(tmp_path: Path) -> None:
    done = []
    for number in range(20):
        uploader = BackgroundUploader(lambda folder: done.append(folder.name), lambda folder: None, 60)
        uploader.submit(tmp_path / str(number))
        uploader.close()
    assert done == [str(number) for number in range(20)]


def test_a_permanent_error_reaches_the_training(tmp_path: Path) -> None:
    def upload(folder: Path) -> None:
        raise AccessDenied("the key was withdrawn")

    uploader = BackgroundUploader(upload, lambda folder: None, 60)
    uploader.submit(tmp_path / "1")
    for call in (uploader.close, uploader.check, lambda: uploader.submit(tmp_path / "2")):
        with pytest.raises(AccessDenied, match="withdrawn"):
            call()


def test_an_unreachable_store_is_tried_again_until_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.store.background._RETRY_S", 0.01)
    answers: list[JobError | None] = [Unreachable("503"), Unreachable("503"), None]

    def upload(folder: Path) -> None:
        if answer := answers.pop(0):
            raise answer

    uploader = BackgroundUploader(upload, lambda folder: None, 60)
    uploader.submit(tmp_path / "1")
    uploader.close()
    assert answers == []

    def upload_never(folder: Path) -> None:
        raise Unreachable("503")

    uploader = BackgroundUploader(upload_never, lambda folder: None, 0.05)
    uploader.submit(tmp_path / "1")
    with pytest.raises(Unreachable) as caught:
        uploader.close()
    assert caught.value.exit_code == 77
