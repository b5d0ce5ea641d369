"""Packed rows: the same loss for every token as padded ones, and no row that sees another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.data.tokenize import TokenTable
from job.errors import RecipeError
from job.tasks import get_task
from job.train.packing import PackedCollator, check_packing, pack_lengths
from job.train.stream import Collator

TASK = get_task("causal-lm")
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def make_table(lengths: list[int]) -> TokenTable:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 100, sum(lengths)).astype(np.uint16)
    labels = np.where(rng.random(sum(lengths)) < 0.2, -100, rng.integers(1, 100, sum(lengths))).astype(np.int32)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return TokenTable(tokens, None, offsets, labels, np.arange(len(lengths)) + 1, per_token=True)


def make_model(kind: str, attention: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, intermediate_size=64, max_position_embeddings=128)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_loss_and_the_gradient_of_padded_ones(kind: str, attention: str) -> None:
    table, model = make_table([20, 3, 9, 14, 1, 7]), make_model(kind, attention)
    rows = [0, 1, 2, 3, 4, -1, 5]
    check_packing(model, table, 0)
    found = []
    for batch in (Collator(table, 0, with_rows=False)(rows), PackedCollator(table, 0, 32)(rows)):
        batch.pop("row", None)
        labels = batch.pop("labels")
        count = (labels != -100).sum()
        model.zero_grad()
        loss = TASK.sum_loss(model(**batch).logits, labels, 0.0) / count
        loss.backward()
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        found.append((loss.item(), int(count), gradient))
    (padded, count, one), (packed, same_count, other) = found
    assert count == same_count
    assert packed == pytest.approx(padded, abs=1e-5)
    assert torch.allclose(one, other, atol=1e-5)


def test_packing_computes_hardly_any_padding() -> None:
    table = make_table([3 + n % 30 for n in range(64)])
    rows = list(range(64))
    packed, padded = PackedCollator(table, 0, 128)(rows), Collator(table, 0, with_rows=True)(rows)
    assert packed["input_ids"].numel() < 1.1 * table.lengths.sum() < 0.7 * padded["input_ids"].numel()
    assert packed["row"].tolist() == padded["row"].tolist()


def test_prompts_add_nothing_to_the_gradient_of_a_completion() -> None:
    """What stands at tokens without a label may be anything, as long as the model does not look back at it."""
    model = make_model("llama", "eager")
    ids = torch.arange(1, 11)[None]
    labels = torch.tensor([[-100] * 6 + [7, 8, 9, 10]])
    logits = model(input_ids=ids).logits
    logits.retain_grad()
    TASK.sum_loss(logits, labels, 0.0).backward()
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad[0, :6]) == 0
    assert torch.count_nonzero(logits.grad[0, 6:]) == logits.grad[0, 6:].numel()


def test_a_model_that_lets_packed_rows_see_each_other_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"see each other in a BloomForCausalLM.*leave packing out"):
        check_packing(make_bloom(), make_table([5, 9]), 0)


def make_bloom() -> Any:
    """A model whose positions come from its mask, and which takes no position_ids."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", n_layer=2, hidden_size=32, n_head=4))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 64))
def test_every_row_is_packed_once_and_no_line_is_too_long(lengths: list[int], max_length: int) -> None:
    lines = pack_lengths(lengths, max_length)
    assert sorted(row for line in lines for row in line) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in line) <= max_length or len(line) == 1 for line in lines)
