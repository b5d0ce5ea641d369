"""Token tables with a label for every token: what is padded, asked about, and gathered from batches."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data import TokenTable, save_array
from job.data.columns import Examples
from job.data.tokenize import Encoder, Widths, tokenize_split
from job.errors import DataError, lacks_disk
from job.tasks import IGNORED_LABEL, get_task


def make_table(lengths: list[int], seed: int = 0) -> TokenTable:
    """A table of random tokens, labels and ignored labels; the first token of every row has a label."""
    rng = np.random.default_rng(seed)
    total, offsets = sum(lengths), np.cumsum([0, *lengths])
    labels = np.where(rng.random(total) < 0.3, IGNORED_LABEL, rng.integers(0, 50, total))
    labels[offsets[:-1]] = 7
    return TokenTable(rng.integers(0, 50, total), None, offsets, labels.astype(np.int32), np.arange(len(lengths)), True)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 99))
def test_answers_of_batches_come_back_in_order_whatever_the_batches(lengths: list[int], size: int, seed: int) -> None:
    table = make_table(lengths, seed)
    order = np.random.default_rng(seed).permutation(len(table))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    # each token's answer is its label, so what comes back must be the labels that are asked about
    answers = table.gather((part, table.pad_labels(part)[..., None]) for part in parts)
    np.testing.assert_array_equal(answers[:, 0], table.truth.labels)
    assert len(answers) == len(table.truth.rows) == int((table.labels != IGNORED_LABEL).sum())
    np.testing.assert_array_equal(np.unique(table.truth.rows), np.arange(len(table)))
    np.testing.assert_array_equal(table.truth.rows, table.unit_positions)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 40), st.none() | st.integers(1, 5))
def test_batches_of_like_length_hold_every_row_once_and_no_more_than_fits(
    lengths: list[int], max_tokens: int, max_rows: int | None
) -> None:
    table = make_table(lengths)
    batches = list(table.cut(np.arange(len(table)), max_tokens, max_rows))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(table)))
    assert np.all(np.diff(table.lengths[np.concatenate(batches)]) <= 0), "the longest come first"
    for batch in batches:
        padded = len(batch) * int(table.lengths[batch].max())
        assert padded <= max_tokens or len(batch) == 1
        assert max_rows is None or len(batch) <= max_rows


def test_rows_that_one_text_became_count_as_one() -> None:
    table = replace(make_table([3, 2, 4]), rows=np.array([7, 7, 9]))
    assert set(table.truth.rows) == {0, 1}
    assert set(table.unit_positions) == {0, 1, 2}


def test_the_head_of_a_table_is_its_first_rows_cut() -> None:
    table = make_table([3, 5, 4])
    head = table.head(2, 4)
    assert head.lengths.tolist() == [3, 4]
    np.testing.assert_array_equal(head.tokens, np.concatenate([table.tokens[:3], table.tokens[3:7]]))
    np.testing.assert_array_equal(head.labels, np.concatenate([table.labels[:3], table.labels[3:7]]))


def test_the_token_that_ends_a_text_decides_which_table_it_is(tmp_path: Path) -> None:
    """Two models may share tokenizer.json and differ in what ends a text: a base model and its sibling for chats."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<a>": 0, "<b>": 1, "film": 2}, unk_token="<a>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    examples = Examples(["film film"], None, np.zeros(1, np.int64), np.ones(1, np.int64))
    ends = []
    for end in ("<a>", "<b>"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end)
        folder = tokenize_split(examples, Encoder(get_task("causal-lm"), tokenizer, 16), tmp_path)
        ends.append(int(TokenTable.open(folder).labels[-1]))
    assert ends == [0, 1]


@pytest.mark.parametrize(
    ("vocabulary", "what"),
    [({"<a>": 0, "film": 1}, "Missing .UNK. token"), ({"<a>": 0, "film": 70_000, "[UNK]": 1}, None)],
)
def test_a_tokenizer_that_cannot_encode_is_refused_and_one_with_gaps_is_not(
    tmp_path: Path, vocabulary: dict[str, int], what: str | None
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = Encoder(get_task("causal-lm"), PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<a>"), 16)
    examples = Examples(["film unheard"], None, np.zeros(1, np.int64), np.ones(1, np.int64))
    if what:
        with pytest.raises(DataError, match=f"model.id: its tokenizer cannot encode the texts .*{what}"):
            tokenize_split(examples, encoder, tmp_path)
    else:
        table = TokenTable.open(tokenize_split(examples, encoder, tmp_path))
        assert table.tokens.tolist() == [70_000, 1]


def test_labels_are_padded_with_what_adds_nothing_to_the_loss() -> None:
    table = make_table([2, 4])
    labels = table.pad_labels(np.array([0, 1]))
    assert labels.shape == (2, 4)
    assert (labels[0, 2:] == IGNORED_LABEL).all()
    np.testing.assert_array_equal(labels[1], table.labels[2:])


@pytest.mark.parametrize(("positions", "limit", "width"), [([0], 16, 8), ([0, 1], 16, 16), ([2], 15, 15), ([2], 8, 13)])
def test_rows_are_widened_up_to_a_multiple_but_no_further_than_a_model_takes(
    positions: list[int], limit: int, width: int
) -> None:
    table, rows, widths = make_table([3, 9, 13]), np.array(positions), Widths(8, limit)
    batch = table.pad(rows, 1, widths) | {"labels": table.pad_labels(rows, widths)}
    for name, array in (table.pad(rows, 1) | {"labels": table.pad_labels(rows)}).items():
        longest = array.shape[1]
        np.testing.assert_array_equal(batch[name][:, :longest], array)
        filler = {"input_ids": 1, "attention_mask": 0, "labels": IGNORED_LABEL}[name]
        assert batch[name].shape[1] == width and (batch[name][:, longest:] == filler).all()


def test_what_a_decoder_is_given_is_as_wide_as_its_labels() -> None:
    table = replace(make_table([3, 9]), label_offsets=np.array([0, 2, 12]), about={"decoder_start_id": 1})
    batch, labels = table.pad(np.array([0, 1]), 0, Widths(8, 512)), table.pad_labels(np.array([0, 1]), Widths(8, 512))
    assert batch["decoder_input_ids"].shape == labels.shape == (2, 16)


@pytest.mark.parametrize("numbers", [1_000, 1_000_000])
def test_an_array_that_does_not_fit_on_the_disk_is_not_left_half_written_in_silence(
    tmp_path: Path, numbers: int
) -> None:
    limit, array = resource.getrlimit(resource.RLIMIT_FSIZE), np.arange(numbers)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, limit[1]))
    try:
        with pytest.raises(OSError) as caught:
            save_array(tmp_path / "array.npy", array)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert lacks_disk(caught.value)
    save_array(tmp_path / "array.npy", array)
    assert np.array_equal(np.load(tmp_path / "array.npy", allow_pickle=False), array)
