"""Whatever kills or stops a training, on one machine its final weights are those of the uninterrupted one, bit for bit.

Dropout is on, batches accumulate, an epoch's last batch is short, and data set and collator draw random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import WriteTraining
from safetensors.numpy import load_file
from trainings import ONE, TWO, Trial

MakeTrial = Callable[..., Trial]

DEEPSPEED, BF16, LOADERS = "distributed.engine=deepspeed", "training.precision=bf16", "data.num_workers=2"

ANOTHER_LAUNCHER = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
    "FSDP_VERSION": "2",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
"""What `accelerate launch` and torchrun tell the processes that they start."""


@pytest.fixture(scope="module")
def make_trial(tmp_path_factory: pytest.TempPathFactory, write_training: WriteTraining) -> MakeTrial:
    """Return a function that makes a run of 2 epochs with 7 steps each; a save every 2 steps, an evaluation every 3."""
    path = write_training({"validation": 0.4}, eval_steps=3)
    return lambda *options: Trial(path, tmp_path_factory.mktemp("trial"), *options, noise=True)


def list_evaluations(record: dict[str, Any]) -> list[int]:
    return [entry["step"] for entry in record["history"] if "eval_loss" in entry]


def list_losses(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Step, loss, learning rate and gradient norm of every step; each must also say how fast it was."""
    entries = [entry for entry in record["history"] if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 for entry in entries)
    return [tuple(entry[key] for key in ("step", "loss", "learning_rate", "grad_norm")) for entry in entries]


def test_one_rank_killed_at_an_epochs_end_and_stopped_in_an_evaluation(make_trial: MakeTrial) -> None:
    """Faults 5 and 6, with a number of loading processes that changes between the attempts."""
    straight, broken = make_trial(ONE), make_trial(ONE)
    assert straight.attempt() == 0, straight.reason
    assert broken.attempt("training.save_steps=7", LOADERS, accident="training_step:kill:8") in (78, 79)
    assert broken.pointer["step"] == 7
    assert broken.attempt(accident="prediction_step:usr1:9") == 75, broken.reason
    assert broken.pointer["step"] == 9
    assert broken.attempt(LOADERS) == 0, broken.reason
    assert broken.record["resumed_from"] == 9
    evaluations = list_evaluations(straight.record)
    assert list_evaluations(broken.record) == evaluations
    assert evaluations[:4] == [3, 6, 9, 12], "and transformers 5 evaluates after the last step, too"
    assert list_losses(broken.record) == list_losses(straight.record)
    assert len(list_losses(broken.record)) == 14
    assert broken.record["samples_sha256"] == straight.record["samples_sha256"]
    assert broken.record["samples"] == straight.record["samples"] == 200
    assert_same_bits(broken, straight)


def test_what_another_launcher_left_in_the_environment_changes_nothing(
    make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe's precision is fp32, its engine ddp."""
    straight, beside_others = make_trial(ONE), make_trial(ONE)
    assert straight.attempt() == 0, straight.reason
    for name, value in ANOTHER_LAUNCHER.items():
        monkeypatch.setenv(name, value)
    assert beside_others.attempt() == 0, beside_others.reason
    assert list_losses(beside_others.record) == list_losses(straight.record)
    assert_same_bits(beside_others, straight)


@pytest.mark.parametrize("engine", [ONE, DEEPSPEED])
def test_the_optimizer_s_state_reaches_the_store_without_lying_on_this_disk(make_trial: MakeTrial, engine: str) -> None:
    trial = make_trial(engine)
    said = trial.attempt("training.save_steps=14", accident="training_step:pause:2", failpoint="files-uploaded=kill")
    assert said in (78, 79), trial.reason
    (left,) = (trial.run().folder / "train").glob("checkpoint-*")
    (sent,) = (trial.run().folder.parents[2] / "store" / "runs" / "trial" / "checkpoints").iterdir()
    there = {path.name for path in sent.iterdir()}
    assert there - {path.name for path in left.iterdir()} == {"shard-00000.safetensors"}


@pytest.mark.slow
def test_one_rank_after_other_accidents(make_trial: MakeTrial) -> None:
    """Faults 1, 2, 6, 51, 66, 68: each attempt ends otherwise, and the next goes on from what was committed."""
    straight, broken = make_trial(ONE), make_trial(ONE, LOADERS)
    assert straight.attempt() == 0, straight.reason
    assert broken.attempt(accident="training_step:kill:5") in (78, 79)
    assert broken.pointer["step"] == 4
    assert broken.attempt(accident="training_step:loader-kill:6") == 78
    assert "loading process" in broken.reason
    assert broken.pointer["step"] == 6
    # told twice: what was being done is given up, what was committed stays
    assert broken.attempt(accident="training_step:twice:9") == 75
    assert "told twice" in broken.reason
    assert broken.pointer["step"] == 8
    # the signal reaches a loading process only
    assert broken.attempt(accident="training_step:loader-usr1:10") == 75
    assert broken.pointer["step"] == 11
    # an evaluation that crashes costs no commit
    assert broken.attempt(accident="prediction_step:raise:12") == 1
    assert "an accident that no code expects" in broken.reason
    assert broken.pointer["step"] in (11, 12)
    assert broken.attempt(accident="training_step:term:13") == 75, "whoever was told to stop exports nothing"
    assert broken.pointer["step"] == 14
    assert broken.attempt() == 0, broken.reason
    assert_same_bits(broken, straight)
    # finished, but told to stop during the last step, or killed before its end was noted: no step is done twice
    assert broken.attempt() == 0, broken.reason
    assert (broken.record["steps"], broken.record["resumed_from"], broken.record["samples"]) == (14, 14, 200)
    assert broken.record["samples_sha256"] == straight.record["samples_sha256"]
    assert_same_bits(broken, straight)


ENGINES = {
    "ZeRO-2": [TWO, DEEPSPEED, "distributed.zero_stage=2"],
    "DDP": [TWO],
    "DDP, shuffled": [TWO, "training.group_by_length=false"],
    "DDP in bf16": [TWO, BF16],
    "ZeRO-0": [TWO, DEEPSPEED, "distributed.zero_stage=0"],
    "ZeRO-1": [TWO, DEEPSPEED, "distributed.zero_stage=1"],
    "ZeRO-3": [TWO, DEEPSPEED, "distributed.zero_stage=3"],
    "ZeRO-0 in bf16, one rank": [ONE, DEEPSPEED, "distributed.zero_stage=0", BF16],
    "ZeRO-2 in bf16": [TWO, DEEPSPEED, "distributed.zero_stage=2", BF16],
    "ZeRO-3 in bf16": [TWO, DEEPSPEED, "distributed.zero_stage=3", BF16],
}


@pytest.mark.parametrize(
    "options",
    [pytest.param(options, id=name, marks=[pytest.mark.slow] if index else []) for index, (name, options) in
     enumerate(ENGINES.items())],
)  # fmt: skip
def test_an_engine_after_a_kill_in_an_epoch(make_trial: MakeTrial, options: list[str]) -> None:
    """Fault 7: one of the ranks is killed, the next attempt goes on."""
    straight, broken = make_trial(*options), make_trial(*options, LOADERS)
    assert straight.attempt() == 0, straight.reason
    assert broken.attempt(accident="training_step:kill:5", rank=1 if TWO in options else 0) in (78, 79)
    assert broken.pointer["step"] == 4
    assert broken.attempt() == 0, broken.reason
    assert broken.record["samples_sha256"] == straight.record["samples_sha256"]
    assert_same_bits(broken, straight)


@pytest.mark.slow
@pytest.mark.parametrize("options", [pytest.param(ENGINES[name], id=name) for name in ("DDP", "ZeRO-2", "ZeRO-3")])
def test_two_ranks_stop_together_wherever_the_signal_comes(make_trial: MakeTrial, options: list[str]) -> None:
    """Faults 1 and 5 on two ranks: one is told, both stop at the same step; also at an epoch's end, also twice."""
    straight, broken = make_trial(*options), make_trial(*options, LOADERS)
    assert straight.attempt() == 0, straight.reason
    assert broken.attempt("training.save_steps=7", accident="training_step:kill:8", rank=1) in (78, 79)
    assert broken.pointer["step"] == 7
    assert broken.attempt(accident="prediction_step:usr2:9", rank=1) == 75, broken.reason
    assert broken.pointer["step"] == 9
    assert broken.attempt(accident="training_step:term:10", rank=1) == 75, broken.reason
    assert 11 <= broken.pointer["step"] <= 12
    assert broken.attempt() == 0, broken.reason
    assert list_evaluations(broken.record) == [3, 6, 9, 12]
    assert_same_bits(broken, straight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint-write", "checkpoint-written"])
@pytest.mark.parametrize("action", ["kill", "raise"])
def test_a_rank_that_fails_beside_its_checkpoint_costs_that_checkpoint_at_most(
    make_trial: MakeTrial, name: str, action: str
) -> None:
    straight, broken = make_trial(ONE), make_trial(ONE)
    assert straight.attempt() == 0, straight.reason
    assert broken.attempt(failpoint=f"{name}={action}@3") in (1, 78, 79)
    assert broken.pointer["step"] <= 4
    assert broken.attempt() == 0, broken.reason
    assert_same_bits(broken, straight)


def assert_same_bits(found: Trial, expected: Trial) -> None:
    """The files are equal; where they are not, name the weights that differ."""
    if found.digest != expected.digest:
        ours, theirs = load_file(found.weights), load_file(expected.weights)
        differing = [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()]
        pytest.fail(f"{len(differing)} of {len(theirs)} weights differ, first {differing[:3]}")
