"""What `job show` lists of a store: what each release and run was made of, however damaged a record is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from job.store import Manifest, ManifestEntry, open_store
from job.store.inventory import list_inventory

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
