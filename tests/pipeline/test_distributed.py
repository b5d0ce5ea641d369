"""One recipe on one rank, two ranks, and every engine: the same batches and the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WriteTraining, assert_refused, call_job, write_recipe
from safetensors.numpy import load_file
from trainings import ONE, TWO, Trial

from job.train.cost import Saved

ENGINES = {
    "ddp on one rank": [ONE],
    "ddp on two ranks": [TWO],
    "ddp on two ranks, accumulating": [TWO, "training.max_micro_batch_size=4"],
    "ZeRO-2 on two ranks": [TWO, "distributed.engine=deepspeed", "distributed.zero_stage=2"],
    "ZeRO-3 on two ranks": [TWO, "distributed.engine=deepspeed", "distributed.zero_stage=3"],
}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory, reviews: Path, still_model: Path) -> dict[str, Any]:
    """Train the same recipe in fp32 without dropout on every engine; 100 rows make an uneven last batch."""
    folder = tmp_path_factory.mktemp("engines")
    path = write_recipe(
        folder / "recipe.yaml",
        name="same",
        task="text-classification",
        model={"id": str(still_model)},
        data={"source": str(reviews), "max_length": 48, "limit": 100},
        training={
            "num_train_epochs": 2,
            "global_batch_size": 16,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "seed": 3,
        },
        baselines=[],
        export={"int8": {"targets": ["portable"], "gate": "report_only"}, "latency": False},
        store={"uri": str(folder / "store")},
    )
    return {
        name: _train(Trial(path, folder / str(index), *options))
        for index, (name, options) in enumerate(ENGINES.items())
    }


def _train(trial: Trial) -> dict[str, Any]:
    """Run fetch and train, without the stages after them; return the training's record and weights."""
    assert trial.attempt() == 0, trial.reason
    return {"record": trial.record, "weights": load_file(trial.weights), "files": trial.committed.files}


@pytest.mark.parametrize("engine", list(ENGINES)[1:])
def test_global_batches_are_the_same_on_any_number_of_ranks(trainings: dict[str, Any], engine: str) -> None:
    reference = trainings["ddp on one rank"]["record"]
    assert reference["steps"] == 14
    assert trainings[engine]["record"]["steps"] == 14
    assert trainings[engine]["record"]["samples_sha256"] == reference["samples_sha256"]


@pytest.mark.parametrize("engine", list(ENGINES)[1:])
def test_weights_agree_with_one_rank_up_to_rounding(trainings: dict[str, Any], engine: str) -> None:
    reference, found = trainings["ddp on one rank"]["weights"], trainings[engine]["weights"]
    assert sorted(found) == sorted(reference)
    for name, tensor in reference.items():
        # 14 steps of 1e-3 move a weight by up to 0.014; sums in another order move it by far less
        np.testing.assert_allclose(found[name], tensor, atol=5e-4, err_msg=f"{engine}: {name}")


@pytest.mark.parametrize("engine", ENGINES)
def test_what_ranks_save_is_what_the_cost_of_a_checkpoint_is_calculated_from(
    trainings: dict[str, Any], engine: str
) -> None:
    stage = int(engine[5]) if engine.startswith("ZeRO-") else 0
    found = trainings[engine]
    saved = Saved(sum(tensor.size for tensor in found["weights"].values()), found["record"]["world_size"], stage)
    sizes = {path: entry.size for path, entry in found["files"].items() if path.endswith(".safetensors")}
    shards = [size for path, size in sizes.items() if path.startswith("shard-")]
    assert sizes["model.safetensors"] == pytest.approx(saved.weight_bytes, rel=0.01)
    assert sizes["shard-00000.safetensors"] == pytest.approx(saved.moment_bytes, rel=0.01)
    assert sizes["model.safetensors"] + sum(shards) == pytest.approx(saved.count_sent(saved.ranks), rel=0.01)
    assert len(shards) == (saved.ranks if stage else 1)


def test_first_loss_is_that_of_a_fresh_head_on_every_engine(trainings: dict[str, Any]) -> None:
    for name, training in trainings.items():
        losses = [entry["loss"] for entry in training["record"]["history"] if "loss" in entry]
        assert losses, name
        assert 0.5 < losses[0] < 0.9, f"{name}: {losses[0]}"


def test_a_batch_that_ranks_cannot_share_is_refused_with_the_nearest_that_fits(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["training"]["global_batch_size"] = 15
    path = write_recipe(tmp_path / "recipe.yaml", **recipe)
    answer = call_job("run", str(path), "--work-dir", str(tmp_path / "work"), "--set", TWO)
    assert_refused(answer, 10, "training.global_batch_size", "15", "14")
    assert not (tmp_path / "store" / "runs").exists()


def test_a_rank_that_is_killed_while_a_shared_model_loads_says_nothing_of_the_model(
    write_training: WriteTraining, tmp_path: Path
) -> None:
    trial = Trial(write_training({}), tmp_path, *ENGINES["ZeRO-3 on two ranks"])
    assert trial.attempt(accident="load_model:kill:0", rank=1) in (78, 79), trial.reason
    assert trial.attempt() == 0, trial.reason
