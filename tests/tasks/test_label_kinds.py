"""Sets of labels and numbers: how they are read, what is learned of them, and how answers are judged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from hypothesis import given
from hypothesis import strategies as st

from job.data.columns import LabelMap, check_rows, pick_columns
from job.data.splits import check_splits, check_spread, hold_out
from job.data.targets import list_labels, read_labels, read_number
from job.errors import DataError
from job.export.gate import check_parity, compare_quality
from job.recipe.schema import Data
from job.tasks import IGNORED_LABEL, Examples, Truth, Units, find_head, get_task

SETS = get_task("text-classification:multi_label_classification")
NUMBERS = get_task("text-classification:regression")


def read(values: Any, problem_type: str, **data: Any) -> Examples:
    """Return the examples that a column of labels becomes."""
    about = Data(source="x", columns={"text": "t", "label": "l"}, problem_type=problem_type, **data)  # type: ignore[arg-type]
    rows = values if isinstance(values, Dataset) else Dataset.from_dict({"l": values})
    rows = rows.add_column("t", [f"text {row}" for row in range(len(rows))])
    columns = pick_columns(rows, about, "train")
    return check_rows(columns, LabelMap.build(about, columns, None), about)


def numbers(said: Any, labels: Any) -> tuple[np.ndarray, Truth]:
    """Return a regression's answers and what they are held against."""
    said, labels = np.asarray(said, dtype=np.float32), np.asarray(labels, dtype=np.float32)
    return NUMBERS.reduce(said[:, None], labels), Truth(labels, np.arange(len(labels)))


# --- sets of labels


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (["b", "a"], ["b", "a"]),
        ([], []),
        ("", []),
        ("[]", []),
        ('["science fiction", "a"]', ["science fiction", "a"]),
        ("science fiction, a", ["science fiction", "a"]),
        ("b a", ["b", "a"]),
        ("b,", ["b"]),
        (3, [3]),
    ],
)
def test_labels_are_read_from_lists_json_and_text(value: Any, labels: list[Any]) -> None:
    assert list_labels(value) == labels


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "missing"),
        (["z"], "'z' is not among"),
        (["a", "a"], "'a' stands in the list twice"),
        (float("nan"), "nan"),
    ],
)
def test_a_set_that_is_none_is_a_bad_row(value: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_labels(value, {"a": 0, "b": 1}.get)


def test_sets_have_the_names_of_the_data_whatever_their_form() -> None:
    expected = [[0, 2], [], [1]]
    lists = read([["c", "a"], [], ["b"]], "multi_label_classification")
    assert (list(lists.names), lists.targets) == (["a", "b", "c"], expected)
    text = read(["c, a", "", '["b"]'], "multi_label_classification")
    assert (text.names, text.targets) == (lists.names, expected)
    declared = Features({"l": Sequence(ClassLabel(names=["a", "b", "c"]))})
    ids = read(Dataset.from_dict({"l": [[2, 0], [], [1]]}, features=declared), "multi_label_classification")
    assert (ids.names, ids.targets) == (lists.names, expected)
    named = read([[5, 1], [], [3]], "multi_label_classification", labels={1: "a", 3: "b", 5: "c"})
    assert (named.names, named.targets) == (lists.names, expected)


def test_one_number_for_each_label_is_not_taken_for_a_list_of_ids() -> None:
    with pytest.raises(DataError, match="no 0 or 1 for each"):
        read([[1, 0, 0], [0, 1, 1]], "multi_label_classification")


def test_a_label_that_every_row_has_is_nothing_to_learn() -> None:
    for labels, said in (([["a"], ["a"]], "every row has the label 'a'"), ([[], []], "no row has a label")):
        examples = read(labels, "multi_label_classification", labels=["a", "b"])
        with pytest.raises(DataError, match=said):
            check_splits({"train": examples}, list(examples.names))


@pytest.mark.parametrize(
    ("values", "problem_type"),
    [
        ([["a"], ["b"]], "multi_label_classification"),
        (['["a", "b"]', "a"], "multi_label_classification"),
        ([number / 7 for number in range(30)], "regression"),
        ([str(number / 8) for number in range(30)], "regression"),
    ],
)
def test_labels_of_another_kind_are_refused_with_the_key_that_is_missing(values: list[Any], problem_type: str) -> None:
    with pytest.raises(DataError, match=f"data.problem_type: {problem_type}"):
        read(values, "single_label_classification")


def test_half_stars_and_many_whole_numbers_are_names_as_before() -> None:
    assert len(read([number / 2 for number in range(11)], "single_label_classification").names) == 11
    assert len(read(list(range(100)), "single_label_classification").names) == 100


@given(st.integers(2, 130), st.integers(1, 40), st.integers(0, 9))
def test_f1_of_sets_is_that_of_all_decisions(labels: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    there, said = (rng.random((rows, labels)) < 0.3 for _ in range(2))
    answers = np.where(said, 2.0, -2.0).astype(np.float32)
    scores = SETS.score(answers, Truth(there.astype(np.float32), np.arange(rows)))
    hits, wrong = (said & there).sum(), (said ^ there).sum()
    assert scores["micro_f1"] == pytest.approx(2 * hits / max(2 * hits + wrong, 1), abs=1e-6)
    assert scores["hamming_loss"] == pytest.approx(wrong / said.size, abs=1e-6)
    assert scores["subset_accuracy"] == pytest.approx((said == there).all(axis=1).mean(), abs=1e-6)
    low, high = scores["micro_f1_interval"]
    assert 0 <= low <= scores["micro_f1"] + 1e-6 and scores["micro_f1"] - 1e-6 <= high <= 1


def test_a_set_agrees_only_as_a_whole_and_a_close_call_may_go_either_way() -> None:
    one = np.array([[3.0, -3.0], [0.0004, -2.0], [1.0, 1.0]], dtype=np.float32)
    other = np.array([[3.0, -3.0], [-0.0004, -2.0], [1.0, 1.0]], dtype=np.float32)
    assert SETS.agree(one, other).tolist() == [True, False, True]
    assert check_parity(SETS, one, other, np.arange(3))["agreement"] == pytest.approx(2 / 3, abs=1e-6)


def test_the_loss_of_sets_is_transformers_and_knows_no_filler() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 5), (torch.rand(4, 5) < 0.5).float()
    expected = torch.nn.BCEWithLogitsLoss(reduction="sum")(logits, labels)
    assert SETS.sum_loss(logits, labels, 0.0).item() == pytest.approx(expected.item(), abs=1e-5)
    filled = torch.cat([labels, torch.full((2, 5), float(IGNORED_LABEL))])
    found = SETS.sum_loss(torch.cat([logits, torch.full((2, 5), 9.0)]), filled, 0.0)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    assert int((filled != IGNORED_LABEL).sum()) == labels.numel(), "what Trainer counts is what is summed"


# --- numbers


def test_numbers_are_read_from_text_too_and_anything_else_is_a_bad_row() -> None:
    assert read(["3.5", "-1e3", " 2 "], "regression").targets == [3.5, -1000.0, 2.0]
    assert read([1, 2.5, -3], "regression").names == ("l",)
    for value, problem in ((None, "missing"), ("", "missing"), ("good", "no number"), ("nan", "no number"),
                           (True, "no number"), (1e300, "no number"), ([1.0], "no number")):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            read_number(value)


@pytest.mark.parametrize("labels", [[3.0] * 9, [1e6, 1e6 + 1] * 5, [0.0] * 9])
def test_numbers_that_fp32_cannot_tell_apart_are_refused(labels: list[float]) -> None:
    with pytest.raises(DataError, match=r"data\.test: the labels lie between"):
        check_spread({"train": read([1.0, 2.0], "regression"), "test": read(labels, "regression")})
    check_spread({"train": read([1988.0, 1990.0, 1992.0], "regression")})


def test_numbers_are_held_out_without_a_text_on_both_sides() -> None:
    rest, held = hold_out(read([float(row) for row in range(100)], "regression"), 0.2, 1)
    assert (len(rest), len(held)) == (80, 20)
    assert rest.targets is not None and held.targets is not None
    assert sorted(rest.targets + held.targets) == [float(row) for row in range(100)]


def test_r2_is_the_share_of_variance_and_0_for_the_mean() -> None:
    rng = np.random.default_rng(0)
    labels = rng.normal(20, 5, 400)
    said = labels + rng.normal(0, 2, 400)
    scores = NUMBERS.score(*numbers(said, labels))
    assert scores["r2"] == pytest.approx(1 - np.square(said - labels).mean() / labels.var(), abs=1e-4)
    assert scores["rmse"] == pytest.approx(np.sqrt(np.square(said - labels).mean()), rel=1e-4)
    assert scores["pearson"] == pytest.approx(np.corrcoef(said, labels)[0, 1], abs=1e-4)
    low, high = scores["r2_interval"]
    assert low < scores["r2"] < high < 1
    mean = NUMBERS.score(*numbers(np.full(400, labels.mean()), labels))
    assert (mean["r2"], mean["pearson"], mean["spearman"]) == pytest.approx((0, 0, 0), abs=1e-5)


def test_spearman_gives_equal_numbers_the_mean_of_their_ranks() -> None:
    said, labels = [1.0, 2, 2, 3, 7, 7, 7, 0], [1.0, 1, 2, 3, 3, 9, 8, 8]
    ranks = [2, 3.5, 3.5, 5, 7, 7, 7, 1], [1.5, 1.5, 3, 4.5, 4.5, 8, 6.5, 6.5]
    assert NUMBERS.score(*numbers(said, labels))["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)


@given(st.sampled_from([1e-4, 1.0, 1e5]), st.sampled_from([0.0, -3.0, 400.0]))
def test_the_gates_see_the_same_in_whatever_units_the_labels_are(scale: float, shift: float) -> None:
    rng = np.random.default_rng(3)
    labels = rng.normal(0, 1, 500)
    fp32 = labels + rng.normal(0, 0.5, 500)
    int8 = fp32 + rng.normal(0, 0.06, 500)
    quality = []
    for factor, offset in ((1.0, 0.0), (scale, shift * scale)):
        (one, truth), (other, _) = (numbers(said * factor + offset, labels * factor + offset) for said in (fp32, int8))
        quality.append(compare_quality(NUMBERS, one, other, truth))
        nearly, _ = numbers((fp32 + 2e-4) * factor + offset, labels * factor + offset)
        assert check_parity(NUMBERS, one, nearly, np.arange(500))["agreement"] == 1.0
    for key in ("metric", "drop", "drop_bound", "agreement"):
        assert quality[0][key] == pytest.approx(quality[1][key], abs=5e-3), key
    assert 0.8 < quality[0]["agreement"] < 0.98
    assert quality[0]["drop"] == pytest.approx(0.06**2, abs=6e-3)


def test_the_bound_on_a_drop_of_r2_holds_as_often_as_it_says() -> None:
    """int8 adds errors of its own: in 19 of 20 samples the bound is above the drop of all rows."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(300):
        labels = rng.normal(0, 1, 400)
        fp32 = labels + rng.normal(0, 0.5, 400)
        (one, truth), (other, _) = (numbers(said, labels) for said in (fp32, fp32 + rng.normal(0, 0.2, 400)))
        held += compare_quality(NUMBERS, one, other, truth)["drop_bound"] >= 0.2**2
    assert held / 300 > 0.91


def test_the_loss_of_numbers_is_transformers_and_a_label_of_minus_100_is_no_filler() -> None:
    examples = Examples(["x", "y"], None, np.zeros(2, np.int64), np.arange(2), 0, [-100.0, 7.0])
    labels = torch.tensor([NUMBERS._label(examples, 0), NUMBERS._label(examples, 1)])  # type: ignore[attr-defined]
    assert labels.tolist() == pytest.approx([-100, 7], abs=1e-4)
    assert (labels != IGNORED_LABEL).all()
    logits = torch.tensor([[-98.0], [4.0], [50.0]])
    filled = torch.cat([labels, torch.tensor([float(IGNORED_LABEL)])])
    assert NUMBERS.sum_loss(logits, filled, 0.0).item() == pytest.approx(4 + 9, abs=1e-3)


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4), st.booleans())
def test_a_head_that_leaves_its_units_says_the_same_in_the_datas(mean: float, deviation: float, bias: bool) -> None:
    torch.manual_seed(0)
    head, inputs = torch.nn.Linear(8, 1, bias=bias), torch.randn(5, 8)
    units = Units.measure(mean + deviation * np.array([-1.0, 1.0]), head)
    inner = head(inputs).double()
    units.leave(head)
    outer = head(inputs).double()
    size = abs(units.mean) + units.deviation
    assert torch.allclose(outer, inner * units.deviation + units.mean, atol=2e-6 * size)
    units.enter(head)
    assert torch.allclose(head(inputs).double(), inner, atol=1e-6 * size / units.deviation)
    assert bias or units.mean == 0, "without a bias nothing can be added"


def test_a_standardized_label_is_never_a_filler() -> None:
    labels = Units(0.0, 1.0).standardize(np.array([-100.0, 5.0]))
    assert (labels != IGNORED_LABEL).all() and labels.dtype == np.float32


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "distilbert", "gpt2", "llama", "xlnet", "deberta-v2", "modernbert"]
)
def test_the_head_of_every_kind_of_model_is_found(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind in ("distilbert", "gpt2", "xlnet"):
        sizes = {
            "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
            "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
            "xlnet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},
        }[kind]
    config = AutoConfig.for_model(kind, vocab_size=50, pad_token_id=0, num_labels=1, **sizes)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    inputs = torch.tensor([[5, 6, 7]])
    before = model(input_ids=inputs).logits
    name, head = find_head(model)
    assert name and head is not None
    Units(0.0, 4.0).leave(head)
    assert torch.allclose(model(input_ids=inputs).logits, 4 * before, atol=1e-5)


def test_floats_in_a_column_of_the_source_are_numbers_whatever_their_type() -> None:
    typed = Dataset.from_dict({"l": [1, 2, 3]}, features=Features({"l": Value("float16")}))
    assert read(typed, "regression").targets == [1.0, 2.0, 3.0]
