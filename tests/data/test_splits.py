"""Held-out rows never share a text with train, labels are matched by name or number, bad rows are named."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.data.columns import Examples, LabelMap, RawColumns, check_rows
from job.data.splits import cut_train, hold_out, separate_splits, take_shots
from job.errors import DataError
from job.recipe.schema import Data


def examples(texts: list[str], labels: list[int] | None = None) -> Examples:
    ids = np.array(labels if labels is not None else [i % 2 for i in range(len(texts))], dtype=np.int64)
    return Examples(texts, None, ids, np.arange(1, len(texts) + 1))


def raw(labels: list[Any], texts: list[Any] | None = None, declared: list[str] | None = None) -> RawColumns:
    return RawColumns(
        "train",
        ("text", "text_pair", "label"),
        texts or [f"text {i}" for i in range(len(labels))],
        None,
        labels,
        declared,
    )


@given(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=2, max_size=200), st.floats(0.05, 0.9), st.integers(0, 9))
def test_a_text_never_stands_on_both_sides(texts: list[str], fraction: float, seed: int) -> None:
    rest, held = hold_out(examples(texts), fraction, seed)
    assert not set(rest.texts) & set(held.texts)
    assert sorted(rest.texts + held.texts) == sorted(texts)
    again, _ = hold_out(examples(texts), fraction, seed)
    assert again.texts == rest.texts


def test_a_fraction_keeps_the_share_of_each_label() -> None:
    labels = [0] * 900 + [1] * 100
    _, held = hold_out(examples([f"t{i}" for i in range(1000)], labels), 0.2, 1)
    assert (len(held), int(held.labels.sum())) == (200, 20)


def test_limit_draws_rows_of_every_label_from_a_sorted_file() -> None:
    cut = cut_train(examples([f"t{i}" for i in range(1000)], [0] * 500 + [1] * 500), 100, 1)
    assert len(cut) == 100
    assert 30 < cut.labels.sum() < 70


def test_leaks_beyond_the_limit_are_refused_and_within_it_leave_train() -> None:
    splits = {"train": examples([f"t{i}" for i in range(100)]), "test": examples(["t5", "new"])}
    splits["validation"] = examples(["t 7 ", "other"])
    with pytest.raises(DataError, match=r"train rows? stand.* in test too \(row 6\)"):
        separate_splits(splits, Data(source="x"))
    kept = separate_splits(splits, Data(source="x", max_bad_fraction=0.05))
    assert len(kept["train"]) == 99
    assert len(kept["test"]) == 2


def test_a_test_split_that_is_train_itself_is_told_of_train_and_of_the_splits_not_of_labels() -> None:
    texts = [f"t{i}" for i in range(100)]
    splits = {"train": examples(texts[10:]), "validation": examples(texts[:10]), "test": examples(texts)}
    with pytest.raises(DataError, match=r"data: 90 train rows stand in test too .*, data\.train or data\.test$"):
        separate_splits(splits, Data(source="x"))


@pytest.mark.parametrize(
    ("data", "values", "model", "names", "ids"),
    [
        ({}, ["pos", "neg"], None, ["neg", "pos"], [1, 0]),
        ({}, [1, 0], None, ["0", "1"], [1, 0]),
        ({}, [1.0, 0.0], None, ["0", "1"], [1, 0]),
        ({}, [10, 9], None, ["9", "10"], [1, 0]),
        ({}, [True, False], None, ["false", "true"], [1, 0]),
        ({"labels": ["bad", "good"]}, [True, False], None, ["bad", "good"], [1, 0]),
        ({"labels": {True: "good", False: "bad"}}, [True, False], None, ["good", "bad"], [0, 1]),
        ({"labels": ["bad", "good"]}, [1, 0], None, ["bad", "good"], [1, 0]),
        ({"labels": ["bad", "good"]}, ["good", "bad"], None, ["bad", "good"], [1, 0]),
        ({"labels": {5: "good", 1: "bad"}}, [1, 5], None, ["good", "bad"], [1, 0]),
        ({"labels": {"p": "good", "n": "bad", "m": "bad"}}, ["m", "p"], None, ["good", "bad"], [1, 0]),
        ({}, ["pos", "neg"], ["POS", "NEG"], ["pos", "neg"], [0, 1]),
        ({}, [1, 0], ["NEG", "POS"], ["NEG", "POS"], [1, 0]),
        ({}, ["x", "y"], ["NEG", "POS"], ["x", "y"], [0, 1]),
    ],
)
def test_labels_are_matched_by_name_or_number_and_with_the_models(
    data: dict[str, Any], values: list[Any], model: list[str] | None, names: list[str], ids: list[int]
) -> None:
    mapping = LabelMap.build(Data(source="x", **data), raw(values), model)
    assert mapping.names == names
    assert [mapping.find(value) for value in values] == ids


def test_declared_names_of_the_source_are_used() -> None:
    mapping = LabelMap.build(Data(source="x"), raw([0, 1, 1], declared=["neg", "pos"]), None)
    assert (mapping.names, mapping.find(1), mapping.find(-1)) == (["neg", "pos"], 1, None)


@pytest.mark.parametrize(
    ("text", "label", "problem"),
    [
        (" \n", "a", "row 3: text is empty"),
        (None, "a", "row 3: text is NoneType"),
        ("x\x00", "a", "row 3: text holds a NUL"),
        ("y" * 1_000_001, "a", "row 3: text has 1,000,001 characters"),
        ("fine", None, "row 3: label is missing"),
        ("fine", float("nan"), "row 3: label is missing"),
        ("fine", "c", "row 3: label 'c' is not one of 'a', 'b'"),
    ],
)
def test_a_bad_row_is_named_by_number_and_reason(text: Any, label: Any, problem: str) -> None:
    data = Data(source="x", labels=["a", "b"])
    columns = raw(["a", "b", label], ["one", "two", text])
    mapping = LabelMap.build(data, columns, None)
    with pytest.raises(DataError, match=problem.replace("(", r"\(")):
        check_rows(columns, mapping, data)
    good = check_rows(columns, mapping, data.model_copy(update={"max_bad_fraction": 0.5}))
    assert (len(good), good.set_aside) == (2, 1)


def test_shots_are_as_many_rows_of_each_label_drawn_by_the_seed(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("job").propagate = True
    train = examples([f"t{i}" for i in range(303)], [0] * 200 + [2] * 100 + [3] * 3)
    names = ["zero", "one", "two", "three"]
    drawn = take_shots(train, 8, names, seed=1)
    assert np.bincount(drawn.labels).tolist() == [8, 0, 8, 3]
    assert drawn.rows.tolist() == sorted(drawn.rows)
    assert "label 'three' has 3 train rows, fewer than tuning.shots: 8" in caplog.text
    assert take_shots(train, 8, names, seed=1).texts == drawn.texts
    assert take_shots(train, 8, names, seed=2).texts != drawn.texts
    assert take_shots(train, None, names, seed=1) is train


@pytest.mark.parametrize(
    ("labels", "fraction", "held"),
    [([0, 1] * 5, 0.1, 1), (list(range(100)) * 5, 0.1, 50), (list(range(100)) * 4, 0.1, 40), ([0, 1] * 50, 0.25, 25)],
)
def test_a_fraction_is_held_out_of_few_rows_and_of_many_labels_too(
    labels: list[int], fraction: float, held: int
) -> None:
    whole = examples([f"text {number}" for number in range(len(labels))], labels)
    rest, out = hold_out(whole, fraction, 7)
    assert (len(out), len(rest)) == (held, len(labels) - held)
    assert set(rest.labels.tolist()) == set(labels), "no label loses its last row"
