"""Early stopping and the best model: the same step and the same bits, whatever kills or stops the training between.

A gain that counts is out of reach here, so training ends after the third evaluation, at step 9 of 14; the best of the
three is taken.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WriteTraining, call_job, write_recipe
from safetensors.numpy import load_file
from trainings import ONE, TWO, Trial

DEEPSPEED = "distributed.engine=deepspeed"
LORA = 'tuning={"method": "lora", "r": 4, "dropout": 0.1}'
PARTIAL = "tuning={method: partial, unfreeze: last-1-layers}"

MakeTrial = Callable[..., Trial]


@pytest.fixture(scope="module")
def make_trial(tmp_path_factory: pytest.TempPathFactory, write_training: WriteTraining) -> MakeTrial:
    """Return a function that makes a run with a save every 2 steps and an evaluation every 3."""
    patience = {"early_stopping_patience": 2, "early_stopping_threshold": 0.9}
    path = write_training({"max_length": 32, "validation": 0.2}, learning_rate=3e-2, eval_steps=3, **patience)
    return lambda *options: Trial(path, tmp_path_factory.mktemp("trial"), *options)


def list_evaluations(record: dict[str, Any]) -> list[tuple[int, float]]:
    return [(entry["step"], entry["eval_accuracy"]) for entry in record["history"] if "eval_loss" in entry]


def assert_same_end(found: Trial, expected: Trial) -> None:
    """Both stopped at the same step, for the same reason, with the same model."""
    keys = ("steps", "model_step", "stopped_by", "weights_file", "samples_sha256")
    assert {key: found.record[key] for key in keys} == {key: expected.record[key] for key in keys}
    assert list_evaluations(found.record) == list_evaluations(expected.record)
    ours, theirs = load_file(found.weights), load_file(expected.weights)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()] == []


def test_whatever_kills_a_training_it_stops_at_the_same_step_with_the_same_best_model(make_trial: MakeTrial) -> None:
    straight, broken = make_trial(ONE), make_trial(ONE)
    assert straight.attempt() == 0, straight.reason
    evaluations = list_evaluations(straight.record)
    assert [step for step, _ in evaluations] == [3, 6, 9]
    assert (straight.record["steps"], straight.record["stopped_by"]) == (9, "early stopping")
    best = straight.record["model_step"]
    assert best == max(evaluations, key=lambda each: (each[1], -each[0]))[0]
    assert best < 9, "else the last model would do for the best"
    assert broken.attempt(accident="training_step:kill:5") in (78, 79)
    assert broken.pointer["step"] == 4
    # the checkpoint of step 6 is committed, its evaluation is not done
    assert broken.attempt(accident="prediction_step:kill:6") in (78, 79)
    assert broken.pointer["step"] == 6
    assert broken.attempt(accident="prediction_step:usr1:9") == 75, broken.reason
    assert broken.pointer["step"] == 9
    # what is left is the last evaluation, and the end
    assert broken.attempt() == 0, broken.reason
    assert broken.record["resumed_from"] == 9
    assert_same_end(broken, straight)
    # killed before its end was noted: nothing is left, and no step is done
    assert broken.attempt() == 0, broken.reason
    assert_same_end(broken, straight)
    witness = make_trial(ONE)
    assert witness.attempt("training.save_steps=1", accident=f"training_step:kill:{best}") in (78, 79)
    taken = witness.committed.files["model.safetensors"].sha256
    assert taken == straight.digest, "what is taken are the weights of that step"


def test_all_steps_are_done_and_the_last_is_judged_where_only_the_best_is_asked_for(make_trial: MakeTrial) -> None:
    only_best = ["training.early_stopping_patience=", "training.early_stopping_threshold=0"]
    trial = make_trial(ONE, *only_best, "training.load_best_model_at_end=true")
    assert trial.attempt() == 0, trial.reason
    assert [step for step, _ in list_evaluations(trial.record)] == [3, 6, 9, 12, 14]
    assert (trial.record["steps"], trial.record["stopped_by"]) == (14, "the last step")
    assert trial.record["model_step"] == max(list_evaluations(trial.record), key=lambda each: (each[1], -each[0]))[0]


ENGINES = {
    "DDP": [TWO],
    "ZeRO-0": [TWO, DEEPSPEED, "distributed.zero_stage=0"],
    "ZeRO-2": [TWO, DEEPSPEED, "distributed.zero_stage=2"],
    "ZeRO-3": [TWO, DEEPSPEED, "distributed.zero_stage=3"],
    "LoRA": [ONE, LORA],
    "LoRA, ZeRO-3": [TWO, DEEPSPEED, "distributed.zero_stage=3", LORA],
    "partial, ZeRO-2": [TWO, DEEPSPEED, "distributed.zero_stage=2", PARTIAL],
    "an evaluation an epoch": [ONE, "training.eval_steps=", "training.num_train_epochs=5"],
}


@pytest.mark.slow
@pytest.mark.parametrize("options", [pytest.param(ENGINES[name], id=name) for name in ENGINES])
def test_every_engine_and_method_ends_the_same_after_kills(make_trial: MakeTrial, options: list[str]) -> None:
    straight, broken = make_trial(*options), make_trial(*options)
    assert straight.attempt() == 0, straight.reason
    assert straight.record["stopped_by"] == "early stopping"
    rank, last = (1 if TWO in options else 0), straight.record["steps"]
    assert broken.attempt(accident=f"training_step:kill:{last - 2}", rank=rank) in (78, 79)
    assert broken.attempt(accident=f"prediction_step:term:{last}", rank=rank) == 75, broken.reason
    assert broken.attempt() == 0, broken.reason
    assert_same_end(broken, straight)


@pytest.mark.slow
def test_other_ranks_take_the_same_model(make_trial: MakeTrial, still_model: Path) -> None:
    options = [f"model.id={still_model}", DEEPSPEED, "training.learning_rate=1e-3"]
    straight, moving = make_trial(*options), make_trial(*options)
    assert straight.attempt(ONE, "distributed.zero_stage=1") == 0, straight.reason
    assert moving.attempt(TWO, "distributed.zero_stage=3", accident="training_step:kill:5", rank=1) in (78, 79)
    assert moving.attempt(TWO, "distributed.zero_stage=2", accident="prediction_step:kill:9") in (78, 79)
    assert moving.attempt(ONE, "distributed.zero_stage=1") == 0, moving.reason
    keys = ("steps", "model_step", "stopped_by", "samples_sha256")
    assert [moving.record[key] for key in keys] == [straight.record[key] for key in keys]
    found, expected = load_file(moving.weights), load_file(straight.weights)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=5e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_best_model_is_released_also_from_an_empty_disk(
    tmp_path: Path, recipe: dict[str, Any], method: str
) -> None:
    """The store keeps 2 checkpoints; the best model is older than both."""
    recipe["training"] |= {"max_steps": 30, "eval_steps": 3, "save_steps": 3, "learning_rate": 3e-2}
    recipe["training"] |= {"early_stopping_patience": 4, "early_stopping_threshold": 0.9}
    recipe["tuning"] = {"method": method}
    path = write_recipe(tmp_path / "recipe.yaml", **recipe)
    first = call_job("run", str(path), "--run-id", "r", "--work-dir", str(tmp_path / "work"))
    assert first.code == 0, first.stderr
    train, run = first.result["train"], Path(recipe["store"]["uri"]) / "runs" / "r"
    assert (train["steps"], train["stopped_by"]) == (15, "early stopping")
    saved = json.loads((run / "stages" / "train.json").read_text())
    evaluations = list_evaluations(saved["record"])
    assert train["model_step"] == max(evaluations, key=lambda each: (each[1], -each[0]))[0]
    assert train["model_step"] < 12, "else one of the two checkpoints would be the model"
    assert len(list(run.glob("checkpoints/*/manifest.json"))) == 2
    assert first.result["metrics"]["validation"]["accuracy"] == dict(evaluations)[train["model_step"]]
    report = next(run.parent.parent.glob("models/*/*/report.html")).read_text()
    assert f"The model is that of step {train['model_step']}" in report
    shutil.rmtree(tmp_path / "work")
    again = call_job(
        "run", str(path), "--run-id", "r", "--work-dir", str(tmp_path / "work"),
        "--set", "export.int8.min_agreement=0.5",
    )  # fmt: skip
    assert again.code == 0, again.stderr
    assert "train: already committed, skipped" in again.stderr
    assert again.result["metrics"] == first.result["metrics"]
