"""`job check` says what a run would do, and what would make it fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, call_job, write_recipe

STAGE_2 = "distributed.zero_stage=2"


def check(recipe: dict[str, Any], folder: Path, *options: str) -> Answer:
    path = write_recipe(folder / "recipe.yaml", **recipe)
    words = [word for option in options for word in ("--set", option)]
    answer = call_job("check", str(path), "--work-dir", str(folder / "work"), *words)
    assert answer.code == 0, answer.stderr
    return answer


def test_the_plan_says_steps_memory_bytes_to_the_store_and_how_often_to_save(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    said = check(recipe, tmp_path).stdout
    assert "steps:        6 " in said
    assert "in 2 checkpoints, of which 2 stay" in said
    found = re.search(r"saves: .* one in (\d+) min .*training\.save_steps: (\d+) if a step takes ≈ ([0-9.]+) s", said)
    assert found, said
    assert int(found[1]) >= 1 and int(found[2]) >= 1
    assert not (tmp_path / "store" / "runs").exists()


def read_stall(said: str) -> float:
    return float(re.findall(r"Young, Daly: (\S+) s a save", said)[0])


@pytest.fixture
def on_1024_ranks(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """As Kubeflow's pods are told; returns what the recipe must say."""
    for name, value in {"NNODES": "128", "NPROC_PER_NODE": "8", "MASTER_ADDR": "node-0"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    return ("training.global_batch_size=1024",)


def test_on_1024_ranks_a_save_takes_what_rank_0_copies_all_weights_and_under_ddp_all_moments(
    recipe: dict[str, Any], tmp_path: Path, on_1024_ranks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ddp = read_stall(check(recipe, tmp_path, *on_1024_ranks).stdout)
    zero = read_stall(check(recipe, tmp_path, *on_1024_ranks, "distributed.engine=deepspeed", STAGE_2).stdout)
    assert zero > 0.3 * ddp, "weights are a third"
    for name in ("NNODES", "NPROC_PER_NODE", "MASTER_ADDR"):
        monkeypatch.delenv(f"PET_{name}")
    assert read_stall(check(recipe, tmp_path).stdout) == ddp


def test_no_save_is_suggested_before_the_last_one_is_durable(
    recipe: dict[str, Any], tmp_path: Path, on_1024_ranks: tuple[str, ...]
) -> None:
    said = check(recipe, tmp_path, *on_1024_ranks).stdout
    found = re.search(r"one in (\d+) s .* durable ([\d.]+) s after", said)
    assert found, said
    assert int(found[1]) >= float(found[2]) >= 1.9, "64 times 16 ranks are asked what they have sent"


def test_the_last_step_is_saved_once_also_where_it_is_one_of_the_interval(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    assert "in 1 checkpoint, of which 1 stay" in check(recipe, tmp_path, "training.save_steps=6").stdout


def test_what_does_not_fit_into_memory_is_said_with_what_would(recipe: dict[str, Any], tmp_path: Path) -> None:
    many = ("training.global_batch_size=4000000", "training.max_micro_batch_size=4000000")
    said = check(recipe, tmp_path, *many).stdout
    smaller = re.search(r"may not fit; training\.max_micro_batch_size: (\d+) does", said)
    assert smaller, said
    assert "may not fit" not in check(recipe, tmp_path, many[0], f"training.max_micro_batch_size={smaller[1]}").stdout
