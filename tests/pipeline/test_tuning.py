"""Tuning a part of a model: checkpoints hold that part, a resumed training is exact, the release is the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WriteTraining
from safetensors.numpy import load_file
from trainings import ONE, TWO, Trial

LORA = {"method": "lora", "r": 4, "dropout": 0.1}
PARTIAL = {"method": "partial", "unfreeze": "last-1-layers"}

MakeTrial = Callable[..., Trial]


def zero(stage: int) -> list[str]:
    return [TWO, "distributed.engine=deepspeed", f"distributed.zero_stage={stage}"]


@pytest.fixture(scope="module")
def make_trial(tmp_path_factory: pytest.TempPathFactory, write_training: WriteTraining) -> MakeTrial:
    """Return a function that makes a run of 2 epochs with 7 steps each of a tiny model with dropout."""
    path = write_training({}, weight_decay=0.1)

    def make(tuning: dict[str, Any], *options: str, noise: bool = True) -> Trial:
        sets = [f"tuning={json.dumps(tuning)}", *options]
        return Trial(path, tmp_path_factory.mktemp("trial"), *sets, noise=noise)

    return make


SLOWER = ["training.layerwise_lr_decay=0.5"]
CASES = {
    "LoRA": (LORA, [ONE]),
    "partial, ZeRO-2": (PARTIAL, zero(2)),
    "LoRA, DDP": (LORA, [TWO]),
    "LoRA, ZeRO-0": (LORA, zero(0)),
    "LoRA, ZeRO-1 in bf16": (LORA, [*zero(1), "training.precision=bf16"]),
    "LoRA, ZeRO-2": (LORA, zero(2)),
    "LoRA, ZeRO-3": (LORA, zero(3)),
    "layer-wise rates, ZeRO-2": ({"method": "full"}, [*zero(2), *SLOWER]),
    "layer-wise rates, LoRA, ZeRO-3": (LORA, [*zero(3), *SLOWER]),
    "DoRA, ZeRO-3": ({**LORA, "dora": True}, zero(3)),
    "DoRA": ({**LORA, "dora": True, "rslora": True}, [ONE]),
    "partial": (PARTIAL, [ONE]),
    "partial, ZeRO-3": (PARTIAL, zero(3)),
}


@pytest.mark.parametrize(
    ("tuning", "options"),
    [pytest.param(*CASES[name], id=name, marks=[] if name == "LoRA" else pytest.mark.slow) for name in CASES],
)
def test_a_killed_training_goes_on_to_the_same_bits(
    make_trial: MakeTrial, tuning: dict[str, Any], options: list[str]
) -> None:
    straight, broken = make_trial(tuning, *options), make_trial(tuning, *options)
    assert straight.attempt() == 0, straight.reason
    assert broken.attempt(accident="training_step:kill:5", rank=1 if TWO in options else 0) in (78, 79)
    assert broken.pointer["step"] in (2, 4)
    assert broken.attempt() == 0, broken.reason
    assert broken.record["resumed_from"] in (2, 4)
    assert broken.record["samples_sha256"] == straight.record["samples_sha256"]
    found, expected = load_file(broken.weights), load_file(straight.weights)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name].tobytes() != expected[name].tobytes()] == []


@pytest.mark.slow
@pytest.mark.parametrize("attempts", [[[TWO], [ONE]], [zero(2), [ONE, *zero(2)[1:]]], [zero(3), zero(1)]])
@pytest.mark.parametrize("tuning", [LORA | {"dropout": 0.0}, PARTIAL], ids=["LoRA", "partial"])
def test_the_ranks_and_the_zero_stage_may_change(
    make_trial: MakeTrial, still_model: Path, tuning: dict[str, Any], attempts: list[list[str]]
) -> None:
    model = f"model.id={still_model}"
    straight, moving = (make_trial(tuning, model, noise=False) for _ in range(2))
    assert straight.attempt(ONE) == 0, straight.reason
    assert moving.attempt(*attempts[0], accident="training_step:kill:5") in (78, 79)
    assert moving.attempt(*attempts[1]) == 0, moving.reason
    assert moving.record["samples_sha256"] == straight.record["samples_sha256"]
    found, expected = load_file(moving.weights), load_file(straight.weights)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=5e-4, err_msg=name)
