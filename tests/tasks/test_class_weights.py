"""Class weights: what each label counts, and that the loss is torch's own, however a batch is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss

from job.tasks import IGNORED_LABEL, Task, get_task, weigh_labels

TEXTS, WORDS = get_task("text-classification"), get_task("token-classification")
SETS = get_task("text-classification:multi_label_classification")
NAMES = ("a", "b", "c")
SPLITS = [[12], [5, 7], [4, 4, 4], [1] * 12, [11, 1]]


def mean_in_parts(task: Task, logits: torch.Tensor, labels: torch.Tensor, sizes: list[int], smoothing: float) -> float:
    """Return the loss as ranks and accumulation add it up: the sums of all parts over the counts of all parts."""
    weights = torch.tensor([0.3, 2.0, 7.5])
    parts = list(zip(logits.split(sizes), labels.split(sizes), strict=True))
    total = sum(task.sum_loss(said, there, smoothing, weights) for said, there in parts)
    return float(total / sum(task.count_loss(there, weights) for _, there in parts))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_the_weighted_loss_is_torchs_however_a_batch_is_split(sizes: list[int], smoothing: float) -> None:
    torch.manual_seed(1)
    weights, logits, labels = torch.tensor([0.3, 2.0, 7.5]), torch.randn(12, 3), torch.randint(0, 3, (12,))
    labels[3] = labels[11] = IGNORED_LABEL  # rows that only fill up a batch
    expected = CrossEntropyLoss(weight=weights, label_smoothing=smoothing)(logits, labels)
    assert mean_in_parts(TEXTS, logits, labels, sizes, smoothing) == pytest.approx(expected.item(), rel=1e-6)

    words, tags = torch.randn(12, 5, 3), torch.randint(0, 3, (12, 5))
    tags[:, 0] = tags[2] = IGNORED_LABEL
    expected = CrossEntropyLoss(weight=weights, label_smoothing=smoothing)(words.flatten(0, 1), tags.flatten())
    assert mean_in_parts(WORDS, words, tags, sizes, smoothing) == pytest.approx(expected.item(), rel=1e-6)

    sets = (torch.rand(12, 3) < 0.3).float()
    expected = BCEWithLogitsLoss(pos_weight=weights)(logits, sets * (1 - smoothing) + smoothing / 2)
    assert mean_in_parts(SETS, logits, sets, sizes, smoothing) == pytest.approx(expected.item(), rel=1e-6)


def test_equal_weights_change_nothing() -> None:
    torch.manual_seed(2)
    logits, labels = torch.randn(9, 3), torch.randint(0, 3, (9,))
    for smoothing in (0.0, 0.2):
        weighted = TEXTS.sum_loss(logits, labels, smoothing, torch.ones(3)) / TEXTS.count_loss(labels, torch.ones(3))
        plain = TEXTS.sum_loss(logits, labels, smoothing) / TEXTS.count_loss(labels)
        assert weighted.item() == pytest.approx(plain.item(), rel=1e-6)


def test_balanced_weights_let_all_rows_of_any_label_count_alike() -> None:
    """As scikit-learn's compute_class_weight("balanced") documents it: n / (k · n_c)."""
    labels = np.repeat([0, 1, 2], [70, 7, 23])
    expected = [100 / (3 * 70), 100 / (3 * 7), 100 / (3 * 23)]
    np.testing.assert_allclose(weigh_labels("balanced", NAMES, labels), expected, rtol=1e-6)
    tags = np.concatenate([labels, np.full(50, IGNORED_LABEL)]).astype(np.int32)  # tokens that no label stands on
    np.testing.assert_allclose(weigh_labels("balanced", NAMES, tags), expected, rtol=1e-6)
    rare = weigh_labels("balanced", NAMES, np.array([0, 0, 0, 2]))
    assert rare.tolist() == pytest.approx([4 / 6, 1.0, 2.0]), "a label that no row has leaves the others as they are"


def test_balanced_weights_of_sets_are_the_rows_without_a_label_over_those_with_it() -> None:
    labels = np.zeros((10, 3), dtype=np.float32)
    labels[:2, 0] = labels[:, 1] = 1
    assert weigh_labels("balanced", NAMES, labels).tolist() == [4.0, 1.0, 1.0]


def test_a_label_that_is_not_named_weighs_1() -> None:
    assert weigh_labels({"b": 2.5}, NAMES, np.zeros(0)).tolist() == [1.0, 2.5, 1.0]
