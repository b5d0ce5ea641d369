"""The number of ranks may change between attempts, and the ZeRO stage: the rows go on in order, none lost or repeated.

Without dropout and in fp32 the weights then differ by rounding only. Fault 45.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import WriteTraining
from safetensors.numpy import load_file
from trainings import ONE, TWO, Trial


def zero(stage: int) -> list[str]:
    return ["distributed.engine=deepspeed", f"distributed.zero_stage={stage}"]


@pytest.fixture(scope="module")
def path(write_training: WriteTraining, still_model: Path) -> Path:
    return write_training({}, still_model)


@pytest.fixture(scope="module")
def straight(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """The training on one rank without an interruption."""
    trial = Trial(path, tmp_path_factory.mktemp("straight"))
    assert trial.attempt(ONE) == 0, trial.reason
    return trial


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "attempts",
    [
        pytest.param([[TWO, *zero(3)], [ONE, *zero(3)]], id="ZeRO-3: 2 → 1"),
        pytest.param([[TWO, *zero(3)], [ONE, *zero(3)], [TWO, *zero(3)]], id="ZeRO-3: 2 → 1 → 2", marks=slow),
        pytest.param([[TWO, *zero(2)], [ONE, *zero(2)], [TWO, *zero(2)]], id="ZeRO-2: 2 → 1 → 2", marks=slow),
        pytest.param([[TWO], [ONE], [TWO]], id="DDP: 2 → 1 → 2", marks=slow),
        pytest.param([[ONE, *zero(1)], [TWO, *zero(1)], [ONE, *zero(1)]], id="ZeRO-1: 1 → 2 → 1", marks=slow),
        pytest.param([[TWO, *zero(2)], [TWO, *zero(3)], [ONE, *zero(0)]], id="ZeRO: 2 → 3 → 0", marks=slow),
        pytest.param([[ONE, *zero(0)], [TWO, *zero(3)], [TWO, *zero(1)]], id="ZeRO: 0 → 3 → 1", marks=slow),
    ],
)
def test_every_row_is_trained_once_on_any_ranks(
    path: Path, straight: Trial, tmp_path: Path, attempts: list[list[str]]
) -> None:
    trial = Trial(path, tmp_path)
    *broken, last = attempts
    for index, options in enumerate(broken):
        assert trial.attempt(*options, accident=f"training_step:kill:{4 * index + 5}") in (78, 79), trial.reason
        # the last save, or the one before: ranks that stand still agree on nothing, so its upload may not have begun
        committed = trial.pointer["step"]
        assert committed in (4 * index + 2, 4 * index + 4)
    assert trial.attempt(*last) == 0, trial.reason
    assert trial.record["resumed_from"] == committed
    assert trial.record["samples"] == straight.record["samples"] == 200
    assert trial.record["samples_sha256"] == straight.record["samples_sha256"]
    found, expected = load_file(trial.weights), load_file(straight.weights)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        # 14 steps of 1e-3 move a weight by up to 0.014; sums in another order move it by far less
        np.testing.assert_allclose(found[name], tensor, atol=5e-4, err_msg=name)
