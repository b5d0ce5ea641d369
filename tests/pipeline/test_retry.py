"""What one node can mend by itself it tries again at once, as an attempt of its own, in the same `job run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ACCIDENTAL_JOB, Answer, assert_refused, call_job, write_recipe
from test_node_faults import OWN_MOUNTS

from job.store import RunStore


def run(tmp_path: Path, recipe: dict[str, Any], *before: str, **variables: str) -> Answer:
    """Run to the end with an accident on the way; `before` stands before the command, OPTION behind it."""
    recipe["training"] |= {"max_steps": int(variables.pop("STEPS", "8")), "save_steps": 3}
    path, work = write_recipe(tmp_path / "recipe.yaml", **recipe), tmp_path / "work"
    work.mkdir(exist_ok=True)
    words = ["run", str(path), "--run-id", "retried", "--work-dir", str(work)]
    words += [variables.pop("OPTION")] if "OPTION" in variables else []
    env = {"JOB_STAND_INS": "train=trainings:run_trial_rank"} | variables
    return call_job(*words, env=env, timeout_s=400, program=(*before, *ACCIDENTAL_JOB))


def read_attempts(recipe: dict[str, Any]) -> list[tuple[int, bool]]:
    """Return (exit code, whether another began at once) of every attempt, oldest first."""
    store = RunStore(recipe["store"]["uri"], "retried")
    keys = [item.key for item in store.objects.list("attempts/")]
    numbers = sorted(int(Path(key).stem) for key in keys if Path(key).stem.isdigit())
    records = [store.read_json(f"attempts/{number}.json") or {} for number in numbers]
    return [(record["exit_code"], record["retried"]) for record in records]


def test_12_too_little_gpu_memory_halves_the_micro_batch_until_it_fits(tmp_path: Path, recipe: dict[str, Any]) -> None:
    done = run(tmp_path, recipe, TRIAL_MEMORY_ROWS="4")
    assert done.code == 0, done.stderr
    assert "GPU memory is too small for 16 rows of" in done.stderr
    assert "with training.max_micro_batch_size: 4" in done.stderr
    assert "global batch 16 = 1 ranks × 4 accumulation × 4 rows" in done.stderr
    assert done.stderr.count("resuming from the checkpoint of step 3") == 2
    assert read_attempts(recipe) == [(78, True), (78, True), (0, False)]


@pytest.mark.slow
def test_12_a_fresh_start_is_fresh_once_and_not_again_after_what_it_mended(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    done = run(tmp_path, recipe, TRIAL_MEMORY_ROWS="8", OPTION="--fresh")
    assert done.code == 0, done.stderr
    assert done.stderr.count("resuming from the checkpoint of step 3") == 1


@pytest.mark.slow
def test_12_where_not_even_one_row_fits_it_is_78_with_rows_and_tokens(tmp_path: Path, recipe: dict[str, Any]) -> None:
    done = run(tmp_path, recipe, TRIAL_MEMORY_ROWS="0")
    assert_refused(done, 78, "too small for 1 row of ", " tokens; lower data.max_length")
    assert read_attempts(recipe) == [*[(78, True)] * 4, (78, False)]


@pytest.mark.slow
def test_14_staging_that_fills_the_disk_is_deleted_and_the_training_goes_on(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    mount = [*OWN_MOUNTS, "sh", "-c", 'mount -t tmpfs -o size=200m tmpfs "$0" && exec "$@"', str(tmp_path / "work")]
    done = run(tmp_path, recipe, *mount, TRIAL_ACCIDENT="training_step:disk-full:5")
    assert done.code == 0, done.stderr
    assert "No space left on device" in done.stderr
    assert "resuming from the checkpoint of step 3" in done.stderr
    assert read_attempts(recipe) == [(78, True), (0, False)]


@pytest.mark.slow
def test_51_a_loading_process_that_dies_is_started_again_once(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["data"]["num_workers"] = 2
    done = run(tmp_path, recipe, TRIAL_ACCIDENT="training_step:loader-kill:5")
    assert done.code == 0, done.stderr
    assert "data.num_workers: a loading process" in done.stderr
    assert "resuming from the checkpoint of step 3" in done.stderr
    assert read_attempts(recipe) == [(78, True), (0, False)]


def test_72_a_port_that_somebody_took_is_left_for_another(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["distributed"] = {"processes_per_node": 2}
    done = run(tmp_path, recipe, JOB_BUSY_PORTS="1")
    assert done.code == 0, done.stderr
    assert "another process took the port on which the ranks were to meet" in done.stderr
    assert read_attempts(recipe) == [(79, True), (0, False)]


@pytest.mark.slow
def test_72_where_the_next_port_is_taken_as_well_it_is_79(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["distributed"] = {"processes_per_node": 2}
    assert_refused(run(tmp_path, recipe, JOB_BUSY_PORTS="2"), 79, "another process took the port")
    assert read_attempts(recipe) == [(79, True), (79, False)]


def test_54_gradients_that_overflow_at_every_scale_end_the_training(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["training"] |= {"global_batch_size": 2}
    done = run(tmp_path, recipe, TRIAL_OVERFLOW="1", STEPS="64")
    assert_refused(done, 14, "training.precision: fp16 gradients overflow even when the loss is scaled by", "bf16")
    assert read_attempts(recipe) == [(14, False)]


def test_73_more_ranks_than_gpus_are_refused_by_the_node_before_anything_begins(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    recipe["distributed"] = {"processes_per_node": 2}
    done = run(tmp_path, recipe, CUDA_VISIBLE_DEVICES="0")
    assert_refused(done, 78, "distributed.processes_per_node: 2, but node ", " has 1 GPU(s)")
    assert read_attempts(recipe) == []
