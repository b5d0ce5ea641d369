"""The commit protocol: a pointer never names what cannot be verified, whoever is killed, late or fenced."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from watched import WatchedStore

from job.errors import (
    AccessDenied,
    CheckpointMismatch,
    Fenced,
    NotFound,
    NoValidCheckpoint,
    PeerLost,
    SecurityRefused,
    Unreachable,
)
from job.recipe.schema import Store as Address
from job.store import ModelPointer, RunStore, latest_release, open_store, publish_release
from job.store.checkpoints import CheckpointWriter
from job.store.commit import fence, move_pointer, read_pointer
from job.store.folder import FolderStore
from job.store.held import HeldFile
from job.store.manifest import list_files
from job.store.objects import Blob, PreconditionFailed
from job.store.records import seal
from job.store.release import read_release_manifest
from job.store.restore import fetch_checkpoint, list_older, name_manifest

ATTEMPT = {"epoch": 1, "nonce": "0123456789abcdef", "keep": 2, "peer_timeout_s": 60.0}


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "store"), "run-1")


def make_checkpoint(folder: Path, rank: int, step: int) -> Path:
    """What one rank leaves on its disk: something of its own; rank 0 also the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"random-{rank}.json").write_bytes(b"%d-%d" % (rank, step) * 50)
    if rank == 0:
        (folder / "model.safetensors").write_bytes(b"weights %d" % step)
    return folder


def commit(writer: CheckpointWriter, place: Path, rank: int, step: int) -> None:
    folder = make_checkpoint(place / f"rank{rank}-step{step}", rank, step)
    shard = HeldFile([memoryview(b"%d-%d" % (rank, step) * 50)], folder / f"shard-{rank}.safetensors")
    writer.commit(folder, step, {"world_size": 2}, {shard.path.name: shard})


def own(store: RunStore, attempt: dict[str, Any] = ATTEMPT) -> None:
    """Let owner.json say that this attempt owns the run."""
    store.write_json("owner.json", {"epoch": attempt["epoch"], "nonce": attempt["nonce"]})


def commit_alone(store: RunStore, place: Path, *steps: int, **attempt: Any) -> CheckpointWriter:
    """Commit checkpoints as the owner of the run."""
    own(store, ATTEMPT | attempt)
    pointer = read_pointer(store.objects)
    standing = [pointer, *list_older(pointer)] if pointer else []
    writer = CheckpointWriter(store, 0, 1, ATTEMPT | {"committed": standing} | attempt)
    for step in steps:
        commit(writer, place, 0, step)
    return writer


def verify_current(store: RunStore, scratch: Path) -> int | None:
    """Fetch and verify everything that current.json names; return its step, None before the first commit."""
    pointer = read_pointer(store.objects)
    if pointer is None:
        return None
    fetch_current(store, scratch / pointer["nonce"])
    return int(pointer["step"])


def fetch_current(store: RunStore, folder: Path, **options: Any) -> Any:
    pointer = read_pointer(store.objects)
    assert pointer is not None
    return fetch_checkpoint(store.objects, pointer["manifest"], pointer["manifest_sha256"], folder, **options)


def committed_steps(store: RunStore) -> list[int]:
    keys = [item.key for item in store.objects.list("checkpoints/") if item.key.endswith("/manifest.json")]
    return sorted(int(key.split("-s")[1][:8]) for key in keys)


# --- checkpoints


def test_two_ranks_commit_checkpoints_that_hold_the_files_of_both(store_uri: str, tmp_path: Path) -> None:
    store = RunStore(store_uri, "run-1")
    own(store)

    def train(rank: int) -> None:
        writer = CheckpointWriter(RunStore(store_uri, "run-1"), rank, 2, ATTEMPT)
        for step in (10, 20, 30):
            commit(writer, tmp_path, rank, step)

    ranks = [threading.Thread(target=train, args=(rank,)) for rank in (1, 0)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    manifest = fetch_current(store, tmp_path / "fetched")
    assert set(manifest.files) == {
        "model.safetensors",
        *(name for r in (0, 1) for name in (f"random-{r}.json", f"shard-{r}.safetensors")),
    }
    assert list_files(tmp_path / "fetched") == sorted(manifest.files)
    assert manifest.about == {"world_size": 2, "step": 30, "epoch": 1}
    assert committed_steps(store) == [20, 30]


def test_a_rank_fetches_only_its_own_files(run: RunStore, tmp_path: Path) -> None:
    commit_alone(run, tmp_path, 10)
    fetch_current(run, tmp_path / "fetched", only=lambda path: path.startswith("model"))
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
        commit_alone(plain, place, found + 10, epoch=2, nonce="f" * 16)
        assert verify_current(plain, place / "scratch") == found + 10


def test_the_last_k_checkpoints_stay_and_nothing_of_the_others(run: RunStore, tmp_path: Path) -> None:
    commit_alone(run, tmp_path, 10, 20, 30, 40, 50, keep=3)
    assert committed_steps(run) == [30, 40, 50]
    folders = {item.key.split("/")[1] for item in run.objects.list("checkpoints/")}
    assert len(folders) == 3


def test_the_last_k_stay_whichever_attempt_wrote_them(run: RunStore, tmp_path: Path) -> None:
    commit_alone(run, tmp_path, 10, 20)
    commit_alone(run, tmp_path, 30, epoch=2, nonce="f" * 16)
    assert committed_steps(run) == [20, 30]
    commit_alone(run, tmp_path, 40, epoch=3, nonce="e" * 16)
    assert committed_steps(run) == [30, 40]


def test_retention_touches_nothing_outside_the_checkpoints(run: RunStore, tmp_path: Path) -> None:
    others = {"checkpoints/notes.txt", "checkpoints/by-hand/manifest.json", "run.json", "stages/train.json"}
    for key in others:
        run.objects.write(key, b"somebody else's")
    commit_alone(run, tmp_path, 10, 20, 30, 40)
    assert {item.key for item in run.objects.list("")} >= others


def test_what_a_dead_attempt_left_half_uploaded_is_removed(run: RunStore, tmp_path: Path) -> None:
    run.objects.write("checkpoints/e0001-s00000010-0123abcd/model.safetensors", b"half")
    commit_alone(run, tmp_path, 20, epoch=2, nonce="f" * 16)
    assert {item.key.split("/")[1] for item in run.objects.list("checkpoints/")} == {"e0002-s00000020-ffffffff"}


def test_who_does_not_own_the_run_deletes_nothing(run: RunStore, tmp_path: Path) -> None:
    writer = commit_alone(run, tmp_path, 10, 20)
    own(run, {"epoch": 2, "nonce": "of a newer attempt"})
    with pytest.raises(Fenced):
        commit(writer, tmp_path, 0, 30)
    assert committed_steps(run) == [10, 20, 30]


def test_what_was_not_committed_does_not_count_among_the_last_k(run: RunStore, tmp_path: Path) -> None:
    commit_alone(run, tmp_path, 10, 20)
    older = (read_pointer(run.objects) or {})["older"]
    commit_alone(run, tmp_path, 15, epoch=2, nonce="f" * 16, committed=older)
    assert committed_steps(run) == [10, 15], "20 was damaged, and the attempt went back to 10"
    zombie = CheckpointWriter(run, 0, 1, ATTEMPT | {"keep": 9})
    with pytest.raises(Fenced):
        commit(zombie, tmp_path, 0, 99)
    commit_alone(run, tmp_path, 25, epoch=3, nonce="e" * 16)
    assert committed_steps(run) == [15, 25]


def commit_with_tokenizer(writer: CheckpointWriter, place: Path, step: int) -> None:
    folder = make_checkpoint(place / f"step{step}", 0, step)
    (folder / "tokenizer.json").write_text("never changes")
    writer.commit(folder, step, {"world_size": 1})


def test_an_unchanged_file_is_not_sent_again_and_neighbours_share_no_object(run: RunStore, tmp_path: Path) -> None:
    uploads: list[str] = []
    run.objects = WatchedStore(run.objects, before=lambda *change: uploads.append(" ".join(change)))
    own(run)
    writer, named = CheckpointWriter(run, 0, 1, ATTEMPT), []
    for step in range(10, 80, 10):
        commit_with_tokenizer(writer, tmp_path, step)
        named.append({entry.key for entry in fetch_current(run, tmp_path / f"fetched-{step}").files.values()})
    assert len([change for change in uploads if change.startswith("upload") and "tokenizer" in change]) == 2
    assert len([change for change in uploads if change.startswith("upload") and "model" in change]) == 7
    assert all(not first & second for first, second in pairwise(named))


def test_an_unchanged_file_is_referenced_across_attempts(run: RunStore, tmp_path: Path) -> None:
    own(run)
    writer = CheckpointWriter(run, 0, 1, ATTEMPT)
    for step in (10, 20):
        commit_with_tokenizer(writer, tmp_path, step)
    pointer = read_pointer(run.objects)
    assert pointer is not None
    committed = [name_manifest(pointer["manifest"], pointer["manifest_sha256"]), *list_older(pointer)]
    attempt = ATTEMPT | {"epoch": 2, "nonce": "f" * 16, "committed": committed}
    own(run, attempt)
    writer = CheckpointWriter(run, 0, 1, attempt)
    for step in (30, 40, 50, 60):
        commit_with_tokenizer(writer, tmp_path, step)
        fetch_current(run, tmp_path / f"fetched-{step}")
    keys = {entry.key for entry in fetch_current(run, tmp_path / "fetched").files.values()}
    assert any(key.endswith("-01234567/tokenizer.json") for key in keys), (
        "sent by the first attempt, named by the second"
    )


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
    standing = read_pointer(run.objects)
    for step in (30, 40):
        with pytest.raises(Fenced) as caught:
            commit(zombie, tmp_path, 0, step)
        assert caught.value.exit_code == 76
    assert read_pointer(run.objects) == standing


@pytest.mark.parametrize("committed_before", [True, False])
def test_an_attempt_that_is_overtaken_in_the_very_swap_is_fenced(
    run: RunStore, tmp_path: Path, committed_before: bool
) -> None:
    plain = RunStore(str(tmp_path / "store"), "run-1")
    newer = seal({"epoch": 9, "attempt": "newer", "step": 7, "manifest": "x", "manifest_sha256": "0"})
    if committed_before:
        commit_alone(plain, tmp_path, 10)

    def overtake(method: str, key: str) -> None:
        if key == "current.json":
            plain.write_json("current.json", newer)

    run.objects = WatchedStore(run.objects, before=overtake)
    with pytest.raises(Fenced):
        commit_alone(run, tmp_path, 20)
    assert read_pointer(plain.objects) == newer


def test_two_attempts_with_the_same_epoch_fence_each_other(run: RunStore, tmp_path: Path) -> None:
    commit_alone(run, tmp_path, 10)
    with pytest.raises(Fenced):
        commit_alone(run, tmp_path, 20, nonce="f" * 16)


def test_a_fence_keeps_what_was_committed_and_stops_the_older_attempt(run: RunStore, tmp_path: Path) -> None:
    zombie = commit_alone(run, tmp_path, 10)
    before = read_pointer(run.objects)
    pointer, _ = fence(run.objects, 2, "newer")
    assert before is not None
    assert [pointer[key] for key in ("manifest", "manifest_sha256", "step")] == [
        before[key] for key in ("manifest", "manifest_sha256", "step")
    ]
    with pytest.raises(Fenced):
        commit(zombie, tmp_path, 0, 20)
    assert verify_current(run, tmp_path / "scratch") == 10


def test_a_fence_before_the_first_commit_names_nothing(run: RunStore) -> None:
    pointer, _ = fence(run.objects, 1, "first")
    assert pointer["manifest"] is None
    assert not pointer.get("lost")
    assert read_pointer(run.objects) is None
    with pytest.raises(Fenced):
        fence(run.objects, 1, "another with the same epoch")


def test_of_many_attempts_at_once_the_highest_epoch_stands(run: RunStore, tmp_path: Path) -> None:
    ready, fenced = threading.Barrier(6), []
    own(run, {"epoch": 6, "nonce": f"{6:016d}"})

    def attempt(epoch: int) -> None:
        mine = RunStore(str(tmp_path / "store"), "run-1")
        writer = CheckpointWriter(mine, 0, 1, ATTEMPT | {"epoch": epoch, "nonce": f"{epoch:016d}", "keep": 99})
        ready.wait()
        try:
            for step in (10, 20):
                commit(writer, tmp_path / str(epoch), 0, step)
        except Fenced:
            fenced.append(epoch)

    attempts = [threading.Thread(target=attempt, args=(epoch,)) for epoch in range(1, 7)]
    for thread in attempts:
        thread.start()
    for thread in attempts:
        thread.join()
    pointer = read_pointer(run.objects)
    assert pointer is not None
    assert (pointer["epoch"], pointer["step"]) == (6, 20)
    assert 6 not in fenced


def test_a_rank_that_never_uploads_is_named_after_the_deadline(run: RunStore, tmp_path: Path) -> None:
    own(run)
    writer = CheckpointWriter(run, 0, 2, ATTEMPT | {"peer_timeout_s": 0.1})
    with pytest.raises(PeerLost, match=r"rank 1 did not upload its part of checkpoints/e0001-s00000010") as caught:
        commit(writer, tmp_path, 0, 10)
    assert caught.value.exit_code == 79
    assert read_pointer(run.objects) is None
    own(run, ATTEMPT | {"nonce": "f" * 16})
    with pytest.raises(Fenced):  # the parts are gone because a newer attempt has cleared them away
        commit(writer, tmp_path, 0, 20)


ODD_PARTS = [
    b"", b"<html>maintenance</html>", b'{"model.safetensors": {"si', b'{"a": 7}', b'{"a": {"size": 1}}',
    b'{"a": {"size": "1", "sha256": "", "key": "k"}}',
]  # fmt: skip


def answer_parts(run: RunStore, data: bytes, times: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the next `times` answers to reading a rank's list of files be `data`; return which were asked for."""
    read, asked = run.objects.read, []

    def read_damaged(key: str) -> Blob | None:
        if "/rank-" not in key or len(asked) >= times:
            return read(key)
        asked.append(key)
        return Blob(data, "e")

    monkeypatch.setattr(run.objects, "read", read_damaged)
    return asked


@pytest.mark.parametrize("data", ODD_PARTS, ids=lambda data: ascii(data[:20]))
def test_a_part_that_was_damaged_on_its_way_is_waited_for(
    run: RunStore, tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.store.checkpoints._POLL_S", 0.01)
    own(run)
    asked = answer_parts(run, data, 3, monkeypatch)
    commit(CheckpointWriter(run, 0, 1, ATTEMPT), tmp_path, 0, 10)
    assert len(asked) == 3
    assert verify_current(run, tmp_path / "scratch") == 10


def test_a_part_that_stays_damaged_is_79(run: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(run)
    answer_parts(run, b"{", 1000, monkeypatch)
    with pytest.raises(PeerLost, match=r"rank 0 did not upload its part of .*, or not whole,"):
        commit(CheckpointWriter(run, 0, 1, ATTEMPT | {"peer_timeout_s": 0.1}), tmp_path, 0, 10)


def test_an_outage_at_the_first_commit_of_an_attempt_forgets_no_older_checkpoint(
    run: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_alone(run, tmp_path, 10)
    pointer = read_pointer(run.objects)
    assert pointer is not None
    own(run)
    writer = CheckpointWriter(run, 0, 1, ATTEMPT | {"committed": [pointer]})
    read, failed = run.objects.read, []

    def fail_once(key: str) -> Blob | None:
        if key.endswith("manifest.json") and not failed:
            failed.append(key)
            raise Unreachable("an outage")
        return read(key)

    monkeypatch.setattr(run.objects, "read", fail_once)
    with pytest.raises(Unreachable):
        commit(writer, tmp_path, 0, 20)
    commit(writer, tmp_path, 0, 20)
    newest = read_pointer(run.objects)
    assert newest is not None
    assert [entry["manifest"] for entry in list_older(newest)] == [pointer["manifest"]]


DAMAGED_POINTERS = [
    b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"{}", b'{"manifest": 7, "manifest_sha256": []}',
    b'{"manifest": null, "manifest_sha256": "0"}',
]  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED_POINTERS, ids=lambda data: ascii(data[:20]))
def test_a_damaged_pointer_is_17_and_no_proof_of_absence(run: RunStore, tmp_path: Path, data: bytes) -> None:
    run.objects.write("current.json", data)
    with pytest.raises(NoValidCheckpoint, match=r"current\.json: damaged"):
        read_pointer(run.objects)
    pointer, _ = fence(run.objects, 1, "first")
    assert pointer["manifest"] is None
    assert pointer["lost"] is True
    again, _ = fence(run.objects, 2, "f" * 16)
    assert again["lost"] is True, "not forgotten by an attempt that died right after its fence"
    commit_alone(run, tmp_path, 10, epoch=2, nonce="f" * 16)
    assert verify_current(run, tmp_path / "scratch") == 10


def damage_once(run: RunStore, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next answer to reading `key` be damaged on its way."""
    read, damaged = run.objects.read, []

    def read_damaged(asked: str) -> Blob | None:
        found = read(asked)
        if asked == key and found and not damaged:
            damaged.append(asked)
            return Blob(found.data[:-9], found.etag)
        return found

    monkeypatch.setattr(run.objects, "read", read_damaged)


def test_a_pointer_that_was_damaged_on_its_way_is_read_again(
    run: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_alone(run, tmp_path, 10, 20)
    standing = read_pointer(run.objects)
    damage_once(run, "current.json", monkeypatch)
    assert read_pointer(run.objects) == standing
    damage_once(run, "current.json", monkeypatch)
    pointer, _ = fence(run.objects, 2, "f" * 16)
    assert standing
    assert (pointer["manifest"], list_older(pointer)) == (standing["manifest"], list_older(standing))


@pytest.mark.parametrize("key", ["checkpoints/gone/manifest.json", "stages/train.json"])
def test_a_manifest_that_is_gone_or_none_is_17(run: RunStore, tmp_path: Path, key: str) -> None:
    run.write_json("stages/train.json", {"kind": "no manifest"})
    for sha256 in (None, "0" * 64):
        with pytest.raises(NoValidCheckpoint):
            fetch_checkpoint(run.objects, key, sha256, tmp_path / "fetched")


def test_a_pointer_that_leads_out_of_the_run_is_refused(run: RunStore, tmp_path: Path) -> None:
    with pytest.raises(SecurityRefused):
        fetch_checkpoint(run.objects, "../../other/manifest.json", None, tmp_path / "fetched")


def test_another_manifest_under_the_same_key_is_17(run: RunStore, tmp_path: Path) -> None:
    commit_alone(run, tmp_path, 10)
    pointer = read_pointer(run.objects)
    assert pointer is not None
    manifest = run.read_json(pointer["manifest"])
    assert manifest is not None
    run.write_json(pointer["manifest"], manifest | {"about": {"step": 11}})
    with pytest.raises(NoValidCheckpoint, match=r"is not what the pointer names"):
        fetch_current(run, tmp_path / "fetched")
    with pytest.raises(NoValidCheckpoint, match=r"not a manifest \(damaged"):
        fetch_checkpoint(run.objects, pointer["manifest"], None, tmp_path / "fetched")


# --- records


def test_the_first_record_written_once_stays(store_uri: str) -> None:
    store = RunStore(store_uri, "run-1")
    assert store.write_once("run.json", {"recipe": 1}) == {"recipe": 1}
    assert store.write_once("run.json", {"recipe": 2}) == {"recipe": 1}
    store.write_json("status.json", {"phase": "train"})
    store.write_json("status.json", {"phase": "export"})
    assert store.read_json("status.json") == {"phase": "export"}
    assert store.read_json("absent.json") is None


def test_a_record_that_was_damaged_on_its_way_is_read_again(run: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_json("run.json", {"recipe": 1})
    damage_once(run, "run.json", monkeypatch)
    assert run.read_json("run.json") == {"recipe": 1}


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


def test_a_release_is_found_by_its_model_once_it_is_promoted(store_uri: str, bundle: Path) -> None:
    model = f"{store_uri}/models/tiny"
    first = publish_release(Address(uri=store_uri), bundle, {"name": "tiny", "run_id": "run-1"}, lambda: None)
    assert latest_release(model) == model, "nothing is promoted yet"
    ModelPointer.of(Address(uri=store_uri), "tiny").promote(first)
    assert latest_release(model) == latest_release(f"{model}/") == f"{model}/{first}"
    (bundle / "config.json").write_text('{"changed": true}')
    second = publish_release(Address(uri=store_uri), bundle, {"name": "tiny", "run_id": "run-2"}, lambda: None)
    assert latest_release(model) == f"{model}/{first}"
    ModelPointer.of(Address(uri=store_uri), "tiny").promote(second)
    assert latest_release(model) == f"{model}/{second}"
    ModelPointer.of(Address(uri=store_uri), "tiny").promote(first)
    assert latest_release(model) == f"{model}/{first}", "a rollback is a promotion"
    for version in (first, second):
        assert latest_release(f"{model}/{version}") == f"{model}/{version}"
        store, manifest = read_release_manifest(f"{model}/{version}")
        assert version.endswith(manifest.sha256[:8])
        assert set(manifest.files) == {"config.json", "onnx/model.onnx"}
        assert all(store.read(entry.key) for entry in manifest.files.values())


def test_the_same_bundle_published_again_is_the_same_release(store_uri: str, bundle: Path) -> None:
    version = publish_release(Address(uri=store_uri), bundle, {"name": "tiny", "run_id": "run-1"}, lambda: None)
    stored = open_store(f"{store_uri}/models/tiny/{version}").read("manifest.json")
    assert publish_release(Address(uri=store_uri), bundle, {"name": "tiny", "run_id": "run-1"}, lambda: None) == version
    assert open_store(f"{store_uri}/models/tiny/{version}").read("manifest.json") == stored
    assert stored is not None
    assert stored.data == (bundle / "manifest.json").read_bytes()


def test_a_release_without_its_manifest_does_not_exist(store_uri: str, bundle: Path) -> None:
    version = publish_release(Address(uri=store_uri), bundle, {"name": "tiny", "run_id": "run-1"}, lambda: None)
    uri = f"{store_uri}/models/tiny/{version}"
    open_store(uri).delete(["manifest.json"])
    with pytest.raises(NotFound, match=r"manifest\.json: no such object"):
        read_release_manifest(uri)


def test_a_checkpoint_is_verified_like_a_release(run: RunStore, tmp_path: Path) -> None:
    commit_alone(run, tmp_path, 10)
    pointer = read_pointer(run.objects)
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
    store_uri = str(tmp_path / "store")
    version = publish_release(Address(uri=store_uri), bundle, {"name": "tiny", "run_id": "run-1"}, lambda: None)
    FolderStore(tmp_path / "store/models/tiny").write("current.json", b"{")
    with pytest.raises(NoValidCheckpoint):
        latest_release(f"{store_uri}/models/tiny")
    ModelPointer.of(Address(uri=store_uri), "tiny").promote(version)
    assert latest_release(f"{store_uri}/models/tiny").endswith(version)


@pytest.mark.parametrize("epoch", [None, "7", 1.5, [], {}])
def test_a_pointer_whose_epoch_is_no_number_fences_nobody(run: RunStore, epoch: object) -> None:
    run.write_json("current.json", {"epoch": epoch, "nonce": "x"})
    pointer = {"epoch": 1, "nonce": "y", "attempt": "z"}
    move_pointer(run.objects, pointer, None)
    assert run.read_json("current.json") == seal(pointer)


def test_who_lost_the_run_does_not_publish(tmp_path: Path, bundle: Path) -> None:
    def refuse() -> None:
        raise Fenced("a newer attempt owns this run")

    address = Address(uri=str(tmp_path / "store"))
    with pytest.raises(Fenced):
        publish_release(address, bundle, {"name": "tiny", "run_id": "run-1"}, refuse)
    assert not list((tmp_path / "store").rglob("manifest.json"))
