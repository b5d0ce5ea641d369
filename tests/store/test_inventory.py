"""What `job show` lists of a store: what each release and run was made of, however damaged a record is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from job.errors import NotFound
from job.recipe.schema import Store as Address
from job.store import Manifest, ManifestEntry, open_store, publish_release
from job.store.inventory import list_inventory, verify_uri

DOMAIN = "s3://bucket/models/domain/domain-run-0123abcd"


@pytest.mark.parametrize(
    ("about", "shown"),
    [
        ({"model": {"id": "distilbert-base-uncased"}, "parent": None}, "distilbert-base-uncased"),
        ({"model": {"id": "s3://bucket/models/domain"}, "parent": DOMAIN}, DOMAIN),
        ({}, ""),
    ],
)
def test_a_release_is_listed_with_what_it_was_made_of(tmp_path: Path, about: dict[str, Any], shown: str) -> None:
    store = open_store(str(tmp_path))
    files = {"config.json": ManifestEntry(2, "0" * 64, "config.json")}
    store.write("models/m/m-run-1/manifest.json", Manifest("release", files, about).to_bytes())
    _, (_, headings, rows) = list_inventory(str(tmp_path))
    assert dict(zip(headings, rows[0], strict=True))["made of"] == shown


def test_a_model_is_listed_with_its_versions_and_one_of_them_is_sent_to_the_verb_for_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    files = {"config.json": ManifestEntry(2, "0" * 64, "config.json")}
    store.write("models/m/m-run-1/manifest.json", Manifest("release", files, {}).to_bytes())
    [(_, _, rows)] = list_inventory(str(tmp_path / "models/m"))
    assert [row[0] for row in rows] == ["m-run-1"]
    with pytest.raises(NotFound, match=r"is a single release or checkpoint; `job verify` takes it"):
        list(list_inventory(str(tmp_path / "models/m/m-run-1")))


@pytest.mark.parametrize("identity", [None, [], {"model": 7}, {"model": {"id": None}}])
def test_a_run_whose_record_is_damaged_is_listed_all_the_same(tmp_path: Path, identity: Any) -> None:
    open_store(str(tmp_path)).write("run.json", json.dumps({"identity": identity}).encode())
    tables = {title: rows for title, _, rows in list_inventory(str(tmp_path))}
    assert tables["made of"] == [["model", "", "", ""], ["data", "", "", ""]]


def test_a_run_is_listed_with_its_model_and_its_data(tmp_path: Path) -> None:
    model = {"id": "s3://bucket/models/domain", "commit": None, "sha256": "ab"}
    identity = {"model": model, "data": {"source": "reviews.csv", "commit": "c1", "fingerprint": "cd"}}
    open_store(str(tmp_path)).write("run.json", json.dumps({"identity": identity}).encode())
    tables = {title: rows for title, _, rows in list_inventory(str(tmp_path))}
    assert tables["made of"] == [
        ["model", "s3://bucket/models/domain", "", "ab"],
        ["data", "reviews.csv", "c1", "cd"],
    ]


@pytest.mark.parametrize("left_s", [1e300, -1e300, float("nan"), float("inf"), "soon", None])
def test_a_progress_that_is_none_is_shown_as_it_is(tmp_path: Path, left_s: Any) -> None:
    store, progress = open_store(str(tmp_path)), {"step": 1, "steps": 2, "percent": 50, "left_s": left_s}
    store.write("run.json", b"{}")
    store.write("status.json", json.dumps({"progress": progress}).encode())
    tables = {title: rows for title, _, rows in list_inventory(str(tmp_path))}
    assert tables["run"] == [["progress", str(progress)]]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A release in a folder store."""
    made = tmp_path / "runs/run-1/bundle"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    base = str(tmp_path / "store")
    version = publish_release(Address(uri=base), made, {"name": "m", "run_id": "run-1"}, lambda: None)
    return Path(base, "models/m", version)


def verify(place: Path | str, tmp_path: Path) -> list[str]:
    return verify_uri(str(place), tmp_path / "scratch")[1]


def test_a_copy_of_a_release_may_lie_in_a_folder_of_any_name(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(release, tmp_path / "copy")
    monkeypatch.chdir(copy)
    for place in (release, tmp_path / "runs/run-1/bundle", copy, ".", "../copy", f"file://{copy}"):
        assert verify(place, tmp_path) == []
    (copy / "config.json").write_text("[]")
    assert "config.json" in verify(".", tmp_path)[0]


def test_a_release_whose_manifest_is_not_the_one_in_its_name_is_damaged(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.parse((release / "manifest.json").read_bytes(), "manifest.json")
    other = Manifest("release", manifest.files, manifest.about | {"made": "later"})
    (release / "manifest.json").write_bytes(other.to_bytes())
    copies = [shutil.copytree(release, tmp_path / name) for name in (release.name, "models/m/other")]
    monkeypatch.chdir(release)
    for place in (release, *copies, "."):
        assert verify(place, tmp_path) == ["manifest.json: its sha256 is not the one in the version's name"]
    assert verify(shutil.copytree(release, tmp_path / "renamed"), tmp_path) == []
