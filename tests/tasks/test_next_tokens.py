"""A language model's rows, loss and scores: every token is asked about once, and numpy and torch answer alike."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from job.tasks import IGNORED_LABEL, Examples, Truth, get_task

TASK = get_task("causal-lm")
END = 99


class Letters:
    """A tokenizer that gives each letter its number, and a token for the beginning."""

    eos_token_id = END

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(letter) - 96 for letter in text]}


def encode(texts: list[str], pairs: list[str] | None = None, max_length: int = 8) -> list[Any]:
    nothing = np.zeros(len(texts), dtype=np.int64)
    return list(TASK.encode(Letters(), Examples(texts, pairs, nothing, nothing), max_length))


@given(st.lists(st.text("abc", max_size=40), max_size=5), st.integers(1, 12))
def test_every_token_of_a_text_and_its_end_is_asked_about_exactly_once(texts: list[str], max_length: int) -> None:
    rows = encode(texts, max_length=max_length)
    for place, text in enumerate(texts):
        mine = [row for row in rows if row.place == place]
        whole = [0, *(ord(letter) - 96 for letter in text), END]
        assert [token for row in mine for token in row.ids] == whole[:-1]
        assert [label for row in mine for label in row.labels] == whole[1:]
        assert all(len(row.ids) == len(row.labels) <= max_length for row in mine)


def test_only_the_completion_is_asked_about() -> None:
    (row,) = encode(["ab"], ["cd"])
    assert row.ids == [0, 1, 2, 3, 4]
    assert row.labels == [IGNORED_LABEL, IGNORED_LABEL, 3, 4, END]


@given(st.text("abc", max_size=30), st.text("abc", max_size=30), st.integers(2, 12))
def test_a_prompt_that_is_too_long_keeps_its_end_and_the_completion(prompt: str, answer: str, max_length: int) -> None:
    (row,) = encode([prompt], [answer], max_length)
    assert len(row.ids) == len(row.labels) <= max_length
    asked = [label for label in row.labels if label != IGNORED_LABEL]
    answer_ids, prompt_ids = [ord(letter) - 96 for letter in answer], [0, *(ord(letter) - 96 for letter in prompt)]
    assert asked, "something is always asked"
    assert asked == [*answer_ids, END][: len(asked)]
    kept = row.ids[: len(row.ids) - len(asked) + 1]
    assert kept == prompt_ids[-len(kept) :], "the prompt keeps its end"
    assert len(kept) >= min(len(prompt_ids), max_length // 4)
    assert row.cut == (len(kept) < len(prompt_ids) or len(asked) <= len(answer_ids))


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 [3, 5, 11] and labels, some ignored."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 11, size=(3, 5))
    labels[0, 3:] = IGNORED_LABEL
    labels[2, 0] = IGNORED_LABEL
    return rng.normal(scale=5, size=(3, 5, 11)).astype(np.float32), labels


def test_torch_and_numpy_reduce_alike(batch: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = batch
    by_torch = TASK.reduce(torch.from_numpy(logits.copy()), torch.from_numpy(labels)).numpy()
    by_numpy = TASK.reduce(logits.copy(), labels)
    assert by_torch.shape == by_numpy.shape == (3, 5, 5)
    np.testing.assert_allclose(by_torch, by_numpy, atol=1e-5)


def test_answers_hold_likelihood_choice_and_lead(batch: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = batch
    asked = labels != IGNORED_LABEL
    answers, flat = TASK.reduce(logits.copy(), labels)[asked], logits[asked]
    logs = torch.log_softmax(torch.from_numpy(flat), -1).numpy()[np.arange(len(flat)), labels[asked]]
    truth = Truth(labels[asked], np.nonzero(asked)[0])
    np.testing.assert_array_equal(TASK.decide(answers), flat.argmax(1))
    ordered = np.sort(flat, axis=1)
    np.testing.assert_allclose(TASK.lead(answers), ordered[:, -1] - ordered[:, -2], rtol=1e-6)
    assert TASK.per_row_score(answers, truth).mean() == pytest.approx(logs.mean(), rel=1e-6)
    scores = TASK.score(answers, truth)
    assert scores["perplexity"] == pytest.approx(math.exp(-logs.mean()), rel=1e-4)
    assert scores["log_likelihood"] == pytest.approx(logs.mean(), rel=1e-5)
    assert scores["n"] == 3
    low, high = scores["log_likelihood_interval"]
    assert low < scores["log_likelihood"] < high


def test_the_loss_is_that_of_transformers() -> None:
    """Our labels are the tokens that follow; transformers shifts them itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).eval()
    ids = torch.randint(0, 100, (2, 7))
    theirs = model(input_ids=ids, labels=ids).loss.detach()
    ours = TASK.sum_loss(model(input_ids=ids).logits[:, :-1], ids[:, 1:], 0.0).detach() / 12
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_the_interval_is_that_of_the_tokens_and_not_of_the_texts_lengths() -> None:
    """Texts of very unlike length whose tokens are all equally likely leave no doubt about a token."""
    rows = np.repeat(np.arange(150), np.random.default_rng(0).integers(1, 200, 150))
    answers = np.tile(np.array([1.0, 4.0, 2.0, 1.0, 7.0], dtype=np.float32), (len(rows), 1))
    scores = TASK.score(answers, Truth(np.full(len(rows), 7), rows))
    assert scores["log_likelihood"] == pytest.approx(-3.0)
    low, high = scores["log_likelihood_interval"]
    assert high - low < 1e-6
