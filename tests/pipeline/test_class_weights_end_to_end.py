"""Class weights in real trainings: one loss on any ranks, torch's own, and a rare label that is found more often."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_refused, call_job, write_recipe
from trainings import ONE, TWO, Trial

from job.data.batching import plan_epoch
from job.data.tokenize import TokenTable
from job.tasks import get_task, load_model


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Path:
    """Real reviews: one positive in 16 of the train rows, half of validation and test."""
    folder = tmp_path_factory.mktemp("imbalanced")
    counts = {"train": (480, 32), "validation": (60, 60), "test": (60, 60)}
    with (assets / "movie-reviews" / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list({row["text"]: row for row in csv.DictReader(file)}.values())
    left = {label: [row for row in rows if row["label"] == label] for label in sorted({row["label"] for row in rows})}
    for split, sizes in counts.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            for label, size in zip(left, sizes, strict=True):
                writer.writerows(left[label][:size])
                left[label] = left[label][size:]
    return folder


def write(folder: Path, model: Path, source: Path, **training: Any) -> Path:
    return write_recipe(
        folder / "recipe.yaml",
        name="imbalanced",
        task="text-classification",
        model={"id": str(model)},
        data={"source": str(source), "max_length": 48, "validation": "validation"},
        training={"global_batch_size": 16, "precision": "fp32", "seed": 3, "logging_steps": 1} | training,
        baselines=[],
        store={"uri": str(folder / "store")},
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, imbalanced: Path, still_model: Path) -> Path:
    training = {"max_steps": 4, "learning_rate": 1e-3, "class_weights": "balanced", "label_smoothing_factor": 0.1}
    return write(tmp_path_factory.mktemp("split"), still_model, imbalanced, **training)


@pytest.fixture(scope="module")
def whole(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """The training on one rank that computes a global batch at once."""
    trial = Trial(path, tmp_path_factory.mktemp("whole"))
    assert trial.attempt(ONE) == 0, trial.reason
    return trial


def test_the_loss_of_a_step_is_torchs_own_over_the_global_batch(whole: Trial) -> None:
    run = whole.run()
    task, data, table = get_task(run.recipe.kind), run.read("data.json"), TokenTable.open(run.tokens("train"))
    weights = whole.record["class_weights"]
    assert [weights[name] for name in data["labels"]] == pytest.approx([512 / 960, 512 / 64], abs=1e-4)
    rows = plan_epoch(table.lengths, 16, run.recipe.training.seed, 0, by_length=True)[0]
    model, _ = load_model(run.base_model, task, data["labels"], run.recipe.training.seed)
    batch = {name: torch.from_numpy(array) for name, array in table.pad(rows, data["pad_id"]).items()}
    criterion = torch.nn.CrossEntropyLoss(torch.tensor([512 / 960, 512 / 64]), label_smoothing=0.1)
    expected = criterion(model.eval()(**batch).logits, torch.from_numpy(table.pad_labels(rows)))
    first = next(entry for entry in whole.record["history"] if "loss" in entry)
    assert first["loss"] == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([ONE, "training.max_micro_batch_size=2"], id="accumulated"),
        pytest.param([TWO, "training.max_micro_batch_size=4"], id="DDP"),
        pytest.param([TWO, "distributed.engine=deepspeed", "distributed.zero_stage=2"], id="ZeRO-2"),
        pytest.param(
            [TWO, "distributed.engine=deepspeed", "distributed.zero_stage=3"], id="ZeRO-3", marks=pytest.mark.slow
        ),
    ],
)
def test_ranks_and_accumulation_do_not_change_what_a_row_weighs(
    path: Path, whole: Trial, tmp_path: Path, options: list[str]
) -> None:
    trial = Trial(path, tmp_path)
    assert trial.attempt(*options) == 0, trial.reason
    for key, tolerance in (("loss", 2e-4), ("grad_norm", 2e-3)):
        found, expected = (
            [entry[key] for entry in each.record["history"] if "loss" in entry] for each in (trial, whole)
        )
        np.testing.assert_allclose(found, expected, rtol=tolerance, err_msg=key)


@pytest.mark.slow
def test_balanced_weights_find_more_of_a_rare_label(tmp_path: Path, imbalanced: Path, assets: Path) -> None:
    """MiniLM's last layer on real reviews, of which 1 in 16 is positive; judged on as many of each.

    A model that never says the rare label has a macro F1 of 1/3 there.
    """
    training = {"num_train_epochs": 3, "learning_rate": 3e-4}
    path, scores = write(tmp_path, assets / "minilm-l6", imbalanced, **training), {}
    for name, options in {"plain": [], "balanced": ["training.class_weights=balanced"]}.items():
        trial = Trial(path, tmp_path / name, "tuning={method: partial, unfreeze: last-1-layers}", *options)
        assert trial.attempt(ONE) == 0, trial.reason
        scores[name] = [entry for entry in trial.record["history"] if "eval_loss" in entry][-1]["eval_macro_f1"]
    assert scores["balanced"] > scores["plain"] >= 0.333, scores


def test_a_weight_of_a_label_that_is_not_there_is_10_before_training(tmp_path: Path, path: Path) -> None:
    options = ["--set", "training.class_weights={neg: 1, positiv: 5}", "--work-dir", str(tmp_path)]
    answer = call_job("run", str(path), *options)
    assert_refused(answer, 10, "training.class_weights: ", "is no label of these data; they have")
