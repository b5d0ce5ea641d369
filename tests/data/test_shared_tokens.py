"""A node that comes later takes large token tables from the store, and trains on the very same."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest

import job.data.tokenize
from job.data import TokenTable, fetch_sources
from job.recipe import Run
from job.recipe.schema import Recipe


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6,000 texts of 40 words to train on, a few to test on."""
    folder, rng = tmp_path_factory.mktemp("rows"), random.Random(1)
    words = [first + second for first in ("film", "plot", "star", "music") for second in ("s", "", "ing", "ed", "less")]
    for name, count in (("train", 6000), ("test", 30)):
        lines = [f"{' '.join(rng.choices(words, k=40))} {row},{('good', 'bad')[row % 2]}" for row in range(count)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return folder


def fetch(work: Path, store: Path, rows: Path, assets: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return identity and data record of a run in the work folder of a node."""
    sections = {
        "name": "x", "task": "text-classification", "model": {"id": str(assets / "minilm-l6")},
        "data": {"source": str(rows), "max_length": 64}, "store": {"uri": str(store), **changes},
    }  # fmt: skip
    run = Run("run", Recipe.model_validate(sections), work)
    run.save()
    return fetch_sources(run), run.read("data.json")


def count_kept(store: Path) -> int:
    return len(list((store / "tokens").glob("*/manifest.json")))


def test_another_node_takes_what_the_first_has_tokenized(
    tmp_path: Path, rows: Path, assets: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    identity, about = fetch(tmp_path / "first", tmp_path / "store", rows, assets)
    assert count_kept(tmp_path / "store") == 1, "train; validation and test are tokenized faster than they are sent"
    write, written = job.data.tokenize._write_table, []

    def note(examples: Any, *rest: Any) -> None:
        written.append(len(examples))
        write(examples, *rest)

    monkeypatch.setattr(job.data.tokenize, "_write_table", note)
    with caplog.at_level(logging.INFO, "job.data"):
        other_identity, other = fetch(tmp_path / "second", tmp_path / "store", rows, assets)
    assert other_identity == identity
    assert max(written) < 1000, "no train row was tokenized again"
    assert "tokens of 5400 texts from the store" in caplog.text
    for split in ("train", "validation", "test"):
        one, two = (Path(each["tokens"][split]) for each in (about, other))
        assert one != two
        assert {file.name: file.read_bytes() for file in one.iterdir()} == {
            file.name: file.read_bytes() for file in two.iterdir()
        }
        assert len(TokenTable.open(two))


def test_a_recipe_may_keep_its_texts_out_of_the_store(tmp_path: Path, rows: Path, assets: Path) -> None:
    fetch(tmp_path / "work", tmp_path / "store", rows, assets, keep_tokens_days=None)
    assert not (tmp_path / "store" / "tokens").exists()
