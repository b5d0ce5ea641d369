"""A node that comes later takes large token tables from the store, and trains on the very same."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import read_all
from transformers import AutoTokenizer

import job.data.tokenize
from job.data import TokenTable, fetch_sources
from job.data.tokenize import Encoder, identify_tokenizer, tokenize_split
from job.recipe import Run
from job.recipe.schema import Recipe
from job.tasks import Examples, get_task


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
        assert read_all(one) == read_all(two)
        assert len(TokenTable.open(two))


def test_a_recipe_may_keep_its_texts_out_of_the_store(tmp_path: Path, rows: Path, assets: Path) -> None:
    fetch(tmp_path / "work", tmp_path / "store", rows, assets, keep_tokens_days=None)
    assert not (tmp_path / "store" / "tokens").exists()


def test_whatever_makes_other_rows_of_a_text_makes_another_table(assets: Path, tmp_path: Path) -> None:
    def name(task: str = "text-classification", **changes: Any) -> str:
        tokenizer = AutoTokenizer.from_pretrained(assets / "minilm-l6")
        for key, value in changes.items():
            setattr(tokenizer, key, value)
        examples = Examples(["one text"], ["another"], np.zeros(1, np.int64), np.zeros(1, np.int64))
        return tokenize_split(examples, Encoder(get_task(task), tokenizer, 16), tmp_path).name

    changes: list[dict[str, Any]] = [
        {},
        {"model_input_names": ["input_ids", "attention_mask"]},
        {"truncation_side": "left"},
        {"chat_template": "{{ messages }}"},
    ]
    names = [name(**each) for each in changes]
    assert len(set(names)) == len(changes)
    assert name() == names[0]


def test_an_edited_chat_template_is_another_tokenizer_to_conversations(assets: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "minilm-l6")
    texts = Examples(["one text"], None, np.zeros(1, np.int64), np.zeros(1, np.int64))
    found = {}
    for template in ("{{ messages }}", "{{ messages }}!"):
        tokenizer.chat_template = template
        found[template] = [identify_tokenizer(tokenizer, each) for each in (texts, replace(texts, targets=[[]]))]
    (plain, chat), (other_plain, other_chat) = found.values()
    assert plain == other_plain
    assert chat != other_chat
