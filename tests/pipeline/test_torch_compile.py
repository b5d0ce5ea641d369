"""training.torch_compile: kernels made for the model train as torch's own do, are kept, and need a compiler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import MakeModel, WriteTraining
from safetensors.numpy import load_file
from trainings import Trial

COMPILED = "training.torch_compile=true"
CASES = {
    "one rank": [],
    "DDP": ["distributed.processes_per_node=2"],
    "LoRA": ["tuning.method=lora", "tuning.r=4"],
    "gradient checkpointing": ["training.gradient_checkpointing=true"],
    "varlen": ["training.attention=varlen"],
}


@pytest.fixture
def still(make_model: MakeModel) -> str:
    """An option that names a model without dropout, for which compiled kernels have a generator of their own."""
    still = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return f"model.id={make_model('bert', max_position_embeddings=64, **still)}"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=pytest.mark.slow if options else pytest.mark.cluster)
        for name, options in CASES.items()
    ],
)
def test_compiled_kernels_train_as_those_of_torch_do_also_after_a_kill(
    write_training: WriteTraining, still: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it in a process that imports its compiler
    recipe, options = write_training({}), [still, *options]
    plain, compiled = Trial(recipe, tmp_path / "plain", *options), Trial(recipe, tmp_path / "other", COMPILED, *options)
    assert plain.attempt() == 0
    assert compiled.attempt(accident="training_step:kill:9") != 0
    kernels = tmp_path / "other" / "work" / "cache" / "inductor"
    assert any(kernels.rglob("*.so")), "it was compiled, and what was is kept for the next attempt"
    assert compiled.attempt() == 0, compiled.reason
    assert compiled.record["resumed_from"] == 8
    wanted, got = load_file(plain.weights), load_file(compiled.weights)
    assert wanted.keys() == got.keys(), "names as without it"
    for name in wanted:
        if name.endswith("key.bias"):  # the same to all scores of a token: its gradient is nothing but rounding
            continue
        assert np.allclose(got[name], wanted[name], atol=2e-4), name


def test_a_node_without_a_compiler_says_what_to_install(
    write_training: WriteTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, str(tmp_path / "no-compiler"))
    trial = Trial(write_training({}), tmp_path / "trial", COMPILED)
    assert trial.attempt() == 10
    assert "no-compiler" in trial.reason
