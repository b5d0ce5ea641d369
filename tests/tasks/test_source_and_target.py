"""Rows of a source and a target: what has labels, what a decoder is given, and what batches of them are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from job.data import TokenTable
from job.data.tokenize import Encoder, tokenize_split
from job.tasks import IGNORED_LABEL, Examples, get_task, load_model

PAD, END, START = 0, 1, 2
TASK = get_task("seq2seq-lm")
LETTERS = {letter: number for number, letter in enumerate("abcdefgh", 3)}


def make_tokenizer(ends: bool) -> Any:
    """A tokenizer that gives each letter its number, and every text an end, or none."""
    vocabulary = {"<pad>": PAD, "</s>": END, "<start>": START, **LETTERS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def examples(rows: list[tuple[str, str]]) -> Examples:
    sources, targets = (list(column) for column in zip(*rows, strict=True))
    return Examples(sources, targets, np.zeros(len(rows), dtype=np.int64), np.arange(1, len(rows) + 1))


def make_table(rows: list[tuple[str, str]], cache: Path, max_length: int = 8) -> TokenTable:
    encoder = Encoder(TASK, make_tokenizer(ends=True), max_length, START)
    return TokenTable.open(tokenize_split(examples(rows), encoder, cache))


def spell(text: str) -> list[int]:
    return [LETTERS[letter] for letter in text]


ROWS = [("abc", "dd"), ("a", "efgh"), ("abcde", "a")]
texts = st.text("abcdefgh", min_size=1, max_size=12)


@pytest.mark.parametrize("ends", [True, False])
@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), max_length=st.integers(2, 16))
def test_all_of_a_target_and_its_end_are_asked_about_unless_it_is_cut(
    ends: bool, rows: list[tuple[str, str]], max_length: int
) -> None:
    encoded = list(TASK.encode(make_tokenizer(ends), examples(rows), max_length))
    assert [row.place for row in encoded] == list(range(len(rows)))
    for row, (source, target) in zip(encoded, rows, strict=True):
        assert row.labels == [*spell(target), END][:max_length]
        assert len(row.ids) <= max_length
        assert row.ids == [*spell(source), END][: len(spell(source)) + ends] or row.cut
        assert row.cut or len(target) < max_length


def test_source_and_target_are_padded_each_to_its_own_longest(tmp_path: Path) -> None:
    table = make_table(ROWS, tmp_path)
    batch, labels = table.pad(np.array([0, 1]), PAD), table.pad_labels(np.array([0, 1]))
    assert batch["input_ids"].tolist() == [[3, 4, 5, END], [3, END, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert labels.tolist() == [[6, 6, END, IGNORED_LABEL, IGNORED_LABEL], [7, 8, 9, 10, END]]
    assert batch["decoder_input_ids"].tolist() == [[START, 6, 6, END, PAD], [START, 7, 8, 9, 10]]
    assert table.lengths.tolist() == [4 + 3, 2 + 5, 6 + 2], "both are computed"
    assert table.truth.rows.tolist() == [0] * 3 + [1] * 5 + [2] * 2


def make_model(kind: str) -> Any:
    """The smallest model of a kind that makes decoder inputs of labels in its own way."""
    import transformers

    ids = {"vocab_size": 16, "pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": START}
    sizes: dict[str, Any] = {"d_model": 8, "max_position_embeddings": 16}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 1, f"{side}_attention_heads": 1, f"{side}_ffn_dim": 8}
    if kind in ("t5", "mt5"):
        sizes = {"d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
    return transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(kind, **ids, **sizes))


@pytest.mark.parametrize("kind", ["t5", "mt5", "bart", "marian", "pegasus"])
def test_a_decoder_is_given_what_its_own_class_would_make_of_the_labels(kind: str, tmp_path: Path) -> None:
    import torch

    table, positions = make_table(ROWS, tmp_path), np.arange(3)
    theirs = make_model(kind).prepare_decoder_input_ids_from_labels(torch.from_numpy(table.pad_labels(positions)))
    assert table.pad(positions, PAD)["decoder_input_ids"].tolist() == theirs.tolist()


def test_answers_come_back_in_the_order_of_the_rows_whatever_batches_they_were_in(tmp_path: Path) -> None:
    table = make_table(ROWS, tmp_path)
    parts = []
    for positions in (np.array([2, 0]), np.array([1])):
        labels = table.pad_labels(positions)
        parts.append((positions, labels[..., None].astype(np.float32)))
    assert table.gather(parts)[:, 0].tolist() == table.truth.labels.tolist()


def test_a_head_cuts_targets_and_leaves_sources_whole(tmp_path: Path) -> None:
    table, positions = make_table(ROWS, tmp_path), np.arange(2)
    head = table.head(2, 2)
    assert head.pad_labels(positions).tolist() == [[6, 6], [7, 8]]
    assert head.pad(positions, PAD)["input_ids"].tolist() == table.pad(positions, PAD)["input_ids"].tolist()
    assert head.pad(positions, PAD)["decoder_input_ids"].tolist() == [[START, 6], [START, 7]]


def test_chosen_rows_keep_their_targets(tmp_path: Path) -> None:
    table = make_table(ROWS, tmp_path)
    chosen = table.take(np.array([1, 2]))
    for name, array in table.pad(np.array([1, 2]), PAD).items():
        assert chosen.pad(np.arange(2), PAD)[name].tolist() == array.tolist(), name
    assert chosen.truth.labels.tolist() == table.truth.labels.tolist()[3:]


def test_positions_that_are_computed_are_neither_missed_nor_trained(tmp_path: Path) -> None:
    """google/pegasus-xsum has none in its files, and its class lets them want a gradient that never comes."""
    import torch
    from safetensors.torch import load_file, save_file

    made = make_model("pegasus")
    made.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    places = [name for name in weights if "embed_positions" in name]
    assert len(places) == 2
    kept = {name: tensor for name, tensor in weights.items() if name not in places}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    model, _ = load_model(tmp_path, TASK, [], seed=0)
    for name in places:
        assert not model.get_parameter(name).requires_grad
        assert torch.equal(model.get_parameter(name), made.get_parameter(name))
    assert model.get_parameter("model.shared.weight").requires_grad
