"""Objects that were copied to this node are taken again as long as they are what was copied, and no halves pile up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from folders import read_all

from job.errors import Unreachable
from job.store import Store, open_store
from job.store.transfer import mirror_objects

DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "gone": lambda file: file.unlink(),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path / "store"))
    for name in ("train", "test"):
        store.write(f"rows/{name}.csv", b"text,label\na,b\n")
    return store


def mirror(store: Store, cache: Path) -> Path:
    folder = mirror_objects(store, "rows/", lambda key: True, cache)
    assert folder
    return folder


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_copy_that_a_power_cut_has_damaged_is_fetched_anew(
    store: Store, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    folder = mirror(store, tmp_path / "cache")
    whole = read_all(folder)
    damage(folder / "rows" / "test.csv")
    assert mirror(store, tmp_path / "cache") == folder
    assert read_all(folder) == whole


def test_a_whole_copy_is_not_fetched_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mirror(store, tmp_path / "cache")
    monkeypatch.setattr(store, "download", None)
    assert mirror(store, tmp_path / "cache") == folder


def test_a_copy_that_broke_off_leaves_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = store.download

    def break_off(key: str, path: Path) -> None:
        fetch(key, path)
        if "train" in key:
            raise Unreachable("the store is out")

    monkeypatch.setattr(store, "download", break_off)
    with pytest.raises(Unreachable):
        mirror(store, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
