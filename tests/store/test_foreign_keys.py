"""Empty objects by which a console marks a folder, and keys that no path can have: they stop nobody, and nobody's data
is read without them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from job.errors import NotFound, SecurityRefused
from job.store import ModelPointer, Pruner, Store, open_store
from job.store.commit import fence
from job.store.inventory import list_events, list_inventory, list_versions
from job.store.manifest import Manifest, ManifestEntry
from job.store.models import fetch_model
from job.store.records import dump
from job.store.retention import Retention
from job.store.s3 import create_bucket
from job.store.transfer import mirror_objects

BUCKET = "foreign"


@pytest.fixture
def uri(moto: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """An unused place in a server that takes every key."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in moto.items():
            patch.setenv(name, value)
        create_bucket(BUCKET, moto)
        yield f"s3://{BUCKET}/{tmp_path.name}"


def put(uri: str, *keys: str) -> None:
    """Write objects as a console does, or any other program."""
    client, place = open_store(uri)._client, uri.removeprefix(f"s3://{BUCKET}/")  # type: ignore[attr-defined]
    for key in keys:
        client.put_object(Bucket=BUCKET, Key=f"{place}/{key}", Body=b"")


def names(store: Store, prefix: str = "") -> set[str]:
    return {item.key for item in store.list(prefix)}


def test_a_listing_passes_over_what_no_call_could_name(uri: str) -> None:
    put(uri, "", "a/", "a//b", "/c", "a/../d", "a/b/c/d/e/f/g/h/i", "a/e")
    store = open_store(uri)
    assert names(store) == names(store, "a/") == {"a/e"}
    assert {item.key for item in store.list("a/", every=True)} == {"a/", "a//b", "a/../d", "a/b/c/d/e/f/g/h/i", "a/e"}
    assert list(store.list_folders("")) == ["a/"]
    assert set(store.list_folders("a/")) == {"a/b/"}


def test_a_folders_listing_passes_over_what_no_call_could_name(tmp_path: Path) -> None:
    deep = tmp_path / "a/b/c/d/e/f/g/h"
    deep.mkdir(parents=True)
    for path in (deep / "i", tmp_path / "a/back\\slash", tmp_path / "a/line\nbreak", tmp_path / "a/e"):
        path.write_bytes(b"")
    store = open_store(str(tmp_path))
    assert names(store) == {"a/e"}
    assert len(list(store.list("", every=True))) == 4


def test_a_marker_is_no_checkpoint_that_was_lost(uri: str) -> None:
    put(uri, "checkpoints/")
    assert "lost" not in fence(open_store(uri), 1, "first")[0]


def test_checkpoints_are_retired_beside_a_marker(uri: str) -> None:
    store, kept = open_store(uri), {}
    store.write("owner.json", dump({"nonce": "n"}))
    for step in (1, 2, 3):
        folder = f"checkpoints/e0001-s{step:08d}-aaaaaaaa"
        manifest = Manifest("checkpoint", {"w": ManifestEntry(1, "0" * 64, f"{folder}/w")}, {"step": step})
        for key, data in ((f"{folder}/w", b"x"), (f"{folder}/manifest.json", manifest.to_bytes())):
            store.write(key, data)
        kept = {f"{folder}/manifest.json": manifest}
        put(uri, f"{folder}/")
    Retention(store, 1, "n").retire(kept)
    assert {key.split("/")[1] for key in names(store, "checkpoints/")} == {"e0001-s00000003-aaaaaaaa"}


FOREIGN = [
    "models/", "models/tiny/", "models/tiny/tiny-1-00000001/", "models/tiny//manifest.json", "models/manifest.json",
    "models/tiny/manifest.json", "models/tiny/tiny-1-00000001/deep/er/manifest.json",
    "runs/", "runs/tiny-1/", "runs/tiny-1/attempts/", "runs/tiny-1/stages/", "runs//x",
]  # fmt: skip


def test_foreign_keys_hide_no_release_and_keep_none_from_going(uri: str) -> None:
    store = open_store(uri)
    for night in (1, 2):
        version, run = f"tiny-{night}-0000000{night}", f"tiny-{night}"
        files = {"config.json": ManifestEntry(2, "0" * 64, "config.json")}
        store.write(f"models/tiny/{version}/config.json", b"{}")
        store.write(f"models/tiny/{version}/manifest.json", Manifest("release", files, {"order": night}).to_bytes())
        store.write(f"runs/{run}/run.json", dump({"recipe": {}}))
        store.write(f"runs/{run}/attempts/1.json", dump({"began": "then"}))
        store.write(f"runs/{run}/stages/release.json", dump({"record": {"release": f"{uri}/models/tiny/{version}"}}))
    model = f"{uri}/models/tiny"
    ModelPointer(open_store(model)).promote("tiny-2-00000002")
    put(uri, *FOREIGN)
    assert [row[0] for row in list_versions(model)[2]] == ["tiny-1-00000001", "tiny-2-00000002"]
    (_, _, runs), (_, _, releases) = list_inventory(uri)
    assert [row[0] for row in runs] == ["tiny-1", "tiny-2"]
    assert [row[:2] for row in releases] == [["tiny", "tiny-1-00000001"], ["tiny", "tiny-2-00000002"]]
    assert [row[2] for _, _, rows in list_events(f"{uri}/runs/tiny-1") for row in rows] == ["attempt began"]
    stages = next(rows for title, _, rows in list_inventory(f"{uri}/runs/tiny-1") if title == "stages")
    assert stages == [["release"]]
    assert Pruner(model).prune(1) == (["tiny-1-00000001"], ["tiny-1"])


def test_a_store_of_markers_alone_holds_nothing(uri: str) -> None:
    put(uri, "models/", "models/tiny/", "runs/", "runs/one/")
    with pytest.raises(NotFound, match="neither runs nor releases"):
        list(list_inventory(uri))


def test_the_marker_of_a_models_folder_does_not_keep_the_model_away(uri: str, tmp_path: Path) -> None:
    put(uri, "", "onnx/")
    for name in ("config.json", "notes.txt"):
        open_store(uri).write(name, b"{}")
    with pytest.raises(NotFound, match=r"holds no model\.safetensors"):
        fetch_model(uri, "main", tmp_path)


@pytest.mark.parametrize("key", ["a//train.csv", "a/../train.csv", "1/2/3/4/5/6/7/8/train.csv"])
def test_a_file_of_a_users_folder_is_refused_rather_than_left_out(uri: str, tmp_path: Path, key: str) -> None:
    put(uri, "train.csv/", "a/train.csv", key)
    with pytest.raises(SecurityRefused, match="not a plain relative path"):
        mirror_objects(open_store(uri), "", lambda key: "train.csv" in key, tmp_path / "cache")
