"""Restoring: the newest whole checkpoint is found whatever was damaged, and absence must be proven."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.errors import AccessDenied, NoValidCheckpoint, SecurityRefused, Unreachable
from job.store import Manifest, ManifestEntry, RunStore
from job.store.checkpoints import CheckpointWriter
from job.store.commit import fence
from job.store.folder import FolderStore
from job.store.inventory import verify_uri
from job.store.manifest import hash_file, list_files
from job.store.objects import Blob
from job.store.records import dump
from job.store.restore import Restored, restore_newest

STEPS = (10, 20, 30)
MAX_BYTES = 1 << 20
MUTATIONS = int(os.environ.get("MUTATIONS", "90"))
"""1,000 of each night; a slice in every run."""


def make_checkpoint(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(random.Random(step).randbytes(2000))
    (folder / "optimizer.safetensors").write_bytes(random.Random(-step).randbytes(500))
    (folder / "tokenizer.json").write_text("never changes")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local store with a run that keeps its checkpoints of steps 10, 20 and 30."""
    place = tmp_path_factory.mktemp("three")
    run = RunStore(str(place / "store"), "run-1")
    attempt = {"epoch": 1, "nonce": "0123456789abcdef", "keep": 3, "peer_timeout_s": 60.0}
    run.write_json("owner.json", {"epoch": 1, "nonce": attempt["nonce"]})
    writer = CheckpointWriter(run, 0, 1, attempt)
    for step in STEPS:
        writer.commit(make_checkpoint(place / f"step-{step}", step), step, {"world_size": 1, "run_id": "run-1"})
    return place


def restore(store: Path, scratch: Path, epoch: int = 2) -> Restored | None:
    """Fence and restore as an attempt does."""
    objects = RunStore(str(store), "run-1").objects
    pointer, _ = fence(objects, epoch, f"{epoch:032d}")
    shutil.rmtree(scratch, ignore_errors=True)
    return restore_newest(objects, pointer, scratch, MAX_BYTES)


def manifest_of(store: Path, step: int) -> Path:
    return next((store / "runs/run-1/checkpoints").glob(f"e*-s{step:08d}-*/manifest.json"))


@pytest.fixture
def store(three: Path, tmp_path: Path) -> Path:
    """A copy of the store that the test may damage."""
    return Path(shutil.copytree(three / "store", tmp_path / "store"))


def test_the_pointer_is_followed_when_all_is_well(store: Path, three: Path, tmp_path: Path) -> None:
    restored = restore(store, tmp_path / "scratch")
    assert restored is not None
    assert (restored.manifest.about["step"], restored.damaged) == (30, [])
    assert_is_step(tmp_path / "scratch", three, 30)


def assert_is_step(found: Path, three: Path, step: int) -> None:
    expected = three / f"step-{step}"
    assert list_files(found) == list_files(expected)
    for name in list_files(expected):
        assert hash_file(found / name) == hash_file(expected / name)


def mutate(path: Path, rng: random.Random) -> str:
    """Flip a bit, cut, or delete; return what was done."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "cut", "delete", "grow"])
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "grow":
        data += rng.randbytes(rng.randrange(1, 20))
    path.unlink() if kind == "delete" else path.write_bytes(data)
    return f"{kind} {path.name}"


@pytest.mark.parametrize("seed", range(MUTATIONS))
def test_every_mutation_of_the_newest_checkpoint_is_noticed_and_the_one_before_is_taken(
    store: Path, three: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    folder = manifest_of(store, 30).parent
    victim = rng.choice(sorted(path for path in folder.iterdir() if not path.name.startswith("rank-")))
    done = mutate(victim, rng)
    restored = restore(store, tmp_path / "scratch")
    assert restored is not None, done
    assert restored.manifest.about["step"] == 20, done
    assert [key.split("-s")[1][:8] for key in restored.damaged] == ["00000030"] or "delete manifest" in done
    assert_is_step(tmp_path / "scratch", three, 20)


@pytest.mark.parametrize("seed", range(MUTATIONS // 3))
def test_with_the_two_newest_damaged_the_third_is_taken(store: Path, three: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(1000 + seed)
    for step in (30, 20):
        folder = manifest_of(store, step).parent
        own = [path for path in folder.iterdir() if not path.name.startswith("rank-")]
        mutate(rng.choice(sorted(own)), rng)
    restored = restore(store, tmp_path / "scratch")
    assert restored is not None
    assert_is_step(tmp_path / "scratch", three, 10)


@pytest.mark.parametrize("seed", range(MUTATIONS // 3))
def test_whatever_happens_to_the_pointer_the_newest_whole_checkpoint_is_taken(
    store: Path, three: Path, tmp_path: Path, seed: int
) -> None:
    done = mutate(store / "runs/run-1/current.json", random.Random(2000 + seed))
    restored = restore(store, tmp_path / "scratch", epoch=10**9)
    assert restored is not None, done
    assert_is_step(tmp_path / "scratch", three, 30)


def test_when_none_of_several_is_whole_it_is_17_and_nothing_is_overwritten(store: Path, tmp_path: Path) -> None:
    for step in STEPS:
        (manifest_of(store, step).parent / "model.safetensors").write_bytes(b"rubbish")
    for epoch in (2, 3):
        with pytest.raises(NoValidCheckpoint, match=r"none of 3 checkpoint\(s\) is whole.*--fresh") as caught:
            restore(store, tmp_path / "scratch", epoch)
        assert caught.value.exit_code == 17
    assert all(manifest_of(store, step).exists() for step in STEPS)


def test_a_pointer_that_was_damaged_with_no_manifest_left_is_17(store: Path, tmp_path: Path) -> None:
    shutil.rmtree(store / "runs/run-1/checkpoints")
    (store / "runs/run-1/current.json").write_bytes(b"{")
    for epoch in (2, 3):
        with pytest.raises(NoValidCheckpoint):
            restore(store, tmp_path / "scratch", epoch)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_what_came_damaged_once_is_fetched_again_before_it_is_given_up(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    damaged: list[str] = []
    read, download = FolderStore.read, FolderStore.download

    def read_damaged(self: FolderStore, key: str) -> Blob | None:
        blob = read(self, key)
        if blob and key.endswith(name) and not damaged:
            damaged.append(key)
            return Blob(blob.data[:-9], blob.etag)
        return blob

    def download_damaged(self: FolderStore, key: str, path: Path, *, size: int | None = None) -> None:
        download(self, key, path, size=size)
        if key.endswith(name) and not damaged:
            damaged.append(key)
            path.write_bytes(bytes(path.stat().st_size))

    monkeypatch.setattr(FolderStore, "read", read_damaged)
    monkeypatch.setattr(FolderStore, "download", download_damaged)
    restored = restore(store, tmp_path / "scratch")
    assert restored is not None
    assert (restored.manifest.about["step"], restored.damaged, len(damaged)) == (30, [], 1)


@pytest.mark.parametrize("about", [{}, {"step": "30", "world_size": 1}, {"step": 30}], ids=str)
def test_a_whole_manifest_that_does_not_say_its_step_is_passed_over(
    store: Path, three: Path, tmp_path: Path, about: dict[str, Any]
) -> None:
    path = manifest_of(store, 30)
    manifest = replace(Manifest.parse(path.read_bytes(), "x"), about=about)
    path.write_bytes(manifest.to_bytes())
    assert restore(store, tmp_path / "scratch") is not None
    assert_is_step(tmp_path / "scratch", three, 20)


def test_a_pointer_whose_manifests_are_all_gone_is_17(store: Path, tmp_path: Path) -> None:
    for step in STEPS:
        manifest_of(store, step).unlink()
    with pytest.raises(NoValidCheckpoint, match="is named but gone"):
        restore(store, tmp_path / "scratch")


def test_a_pointer_that_is_gone_does_not_begin_the_training_anew(store: Path, three: Path, tmp_path: Path) -> None:
    (store / "runs/run-1/current.json").unlink()
    assert restore(store, tmp_path / "scratch") is not None
    assert_is_step(tmp_path / "scratch", three, 30)


def test_verify_of_a_run_names_what_is_damaged_in_any_of_its_checkpoints(store: Path, tmp_path: Path) -> None:
    uri = str(store / "runs/run-1")
    assert verify_uri(uri, tmp_path / "scratch") == (1 + 3 * 5, [])
    (manifest_of(store, 20).parent / "model.safetensors").write_bytes(b"rubbish")
    manifest_of(store, 30).unlink()
    problems = verify_uri(uri, tmp_path / "scratch")[1]
    assert ["s00000030" in problems[0], "s00000020" in problems[1], len(problems)] == [True, True, 2]
    (store / "runs/run-1/current.json").write_bytes(b"{")
    assert "current.json" in verify_uri(uri, tmp_path / "scratch")[1][0]


def test_a_pointer_that_is_gone_with_all_manifests_is_17_while_any_object_is_left(store: Path, tmp_path: Path) -> None:
    (store / "runs/run-1/current.json").unlink()
    for step in STEPS:
        manifest_of(store, step).unlink()
    for epoch in (2, 3):
        with pytest.raises(NoValidCheckpoint, match=r"no manifest is there.*--fresh"):
            restore(store, tmp_path / "scratch", epoch)


def test_a_training_begins_anew_only_in_an_empty_prefix(tmp_path: Path) -> None:
    assert restore(tmp_path / "store", tmp_path / "scratch") is None
    half = tmp_path / "store/runs/run-1/checkpoints/e0001-s00000010-01234567/model.safetensors"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"uploaded, but never named by a manifest")
    assert restore(tmp_path / "store", tmp_path / "scratch", 3) is None


@pytest.mark.parametrize("error", [AccessDenied("LIST: 403"), Unreachable("LIST: 503")], ids=["403", "503"])
def test_a_list_that_fails_proves_nothing(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = RunStore(str(tmp_path / "store"), "run-1").objects
    pointer, _ = fence(objects, 1, "first")

    def refuse(prefix: str) -> Any:
        raise error

    monkeypatch.setattr(objects, "list", refuse)
    with pytest.raises(type(error)):
        restore_newest(objects, pointer, tmp_path / "scratch", MAX_BYTES)


def test_what_was_given_up_by_fresh_is_not_taken_again(store: Path, tmp_path: Path) -> None:
    objects = RunStore(str(store), "run-1").objects
    pointer, _ = fence(objects, 5, "fresh")
    nothing = pointer | {"manifest": None, "manifest_sha256": None, "older": [], "since": 5}
    assert restore_newest(objects, nothing, tmp_path / "scratch", MAX_BYTES) is None


def forge(store: Path, change: Callable[[dict[str, ManifestEntry]], None]) -> None:
    """Replace the newest manifest by one that an intruder would write: whole, sealed, and named by the pointer."""
    path = manifest_of(store, 30)
    whole = Manifest.parse(path.read_bytes(), "x")
    files = dict(whole.files)
    change(files)
    manifest = replace(whole, files=files)
    path.write_bytes(manifest.to_bytes())
    pointer = store / "runs/run-1/current.json"
    pointer.write_bytes(dump(json.loads(pointer.read_text()) | {"manifest_sha256": manifest.sha256}))


@pytest.mark.parametrize(
    "name", ["../escape", "/etc/passwd", "a/../../b", "a\\b", "a\x00b", "./a", "a//b", "x" * 300, "\ud800"], ids=ascii
)
@pytest.mark.parametrize("where", ["path", "key"])
def test_a_hostile_manifest_is_19_and_writes_nothing(store: Path, tmp_path: Path, name: str, where: str) -> None:
    def change(files: dict[str, ManifestEntry]) -> None:
        entry = files.pop("model.safetensors")
        path, key = (name, entry.key) if where == "path" else ("model.safetensors", name)
        files[path] = ManifestEntry(entry.size, entry.sha256, key)

    forge(store, change)
    with pytest.raises(SecurityRefused) as caught:
        restore(store, tmp_path / "scratch")
    assert caught.value.exit_code == 19
    assert not (tmp_path / "scratch").exists()


def test_a_manifest_that_claims_a_terabyte_is_19_before_any_download(store: Path, tmp_path: Path) -> None:
    def change(files: dict[str, ManifestEntry]) -> None:
        entry = files["model.safetensors"]
        files["model.safetensors"] = ManifestEntry(1 << 40, entry.sha256, entry.key)

    forge(store, change)
    with pytest.raises(SecurityRefused, match="1048576 MiB"):
        restore(store, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
