"""Masked language models: what is hidden of a row depends on seed, epoch and row alone, and can be told from it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.data.batching import MicroBatch
from job.data.tokenize import Encoder, TokenTable, tokenize_split
from job.tasks import IGNORED_LABEL, Examples, get_task
from job.train.stream import Collator, SeededBatches, TableRows

TASK = get_task("masked-lm")
TEXTS = [f"the {word} of the house is a large old building near the river" for word in ("owner", "roof", "cat", "end")]


@pytest.fixture(scope="module")
def tokenizer(assets: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets / "minilm-l6")


@pytest.fixture(scope="module")
def table(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    nothing = np.zeros(len(TEXTS), dtype=np.int64)
    examples = Examples(TEXTS, None, nothing, np.arange(len(TEXTS)) + 1)
    return TokenTable.open(tokenize_split(examples, Encoder(TASK, tokenizer, 32), tmp_path_factory.mktemp("cache")))


def fetch(table: TokenTable, epoch: int, *micro_batches: list[int]) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of each row, fetched in these micro-batches, by position."""
    collate, redraw = Collator(table, 0, with_rows=True), partial(TASK.redraw, table.about)
    batches, found = SeededBatches(TableRows(np.arange(len(table))), collate, 7, redraw), {}
    for number, positions in enumerate(micro_batches):
        batch = batches.__getitems__(MicroBatch(epoch, number, positions))
        for line, position in enumerate(positions):
            length = int(table.lengths[position])
            found[position] = tuple(batch[name][line, :length].tolist() for name in ("input_ids", "labels"))
    return [found[position] for position in sorted(found)]


def test_an_epoch_hides_the_same_tokens_however_its_rows_are_shared_and_another_epoch_others(table: TokenTable) -> None:
    one = fetch(table, 0, [0, 1, 2, 3])
    assert fetch(table, 0, [3, 1], [2], [0]) == one
    assert fetch(table, 1, [0, 1, 2, 3]) != one


def test_what_is_hidden_is_what_stood_there(table: TokenTable, tokenizer: Any) -> None:
    for epoch in range(4):
        for text, (ids, labels) in zip(TEXTS, fetch(table, epoch, [0, 1, 2, 3]), strict=True):
            whole = [label if label != IGNORED_LABEL else token for token, label in zip(ids, labels, strict=True)]
            assert whole == tokenizer(text)["input_ids"]
            hidden = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED_LABEL]
            assert len(hidden) == round(0.15 * (len(ids) - 2))


def test_rows_to_be_judged_have_the_same_tokens_hidden_for_ever(table: TokenTable, tokenizer: Any) -> None:
    nothing = np.zeros(len(TEXTS), dtype=np.int64)
    again = list(TASK.encode(tokenizer, Examples(TEXTS[::-1], None, nothing, nothing), 32))[::-1]
    assert [token for row in again for token in row.ids] == table.tokens.tolist()
    assert [label for row in again for label in row.labels] == table.labels.tolist()  # type: ignore[union-attr]
