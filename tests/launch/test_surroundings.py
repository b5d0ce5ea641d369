"""What an environment holds for other programs changes nothing of what a stage computes, and nothing of its end."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

from job.launch import Limits, StopRequest, Supervisor
from job.launch.surroundings import inherit
from job.recipe import Run
from job.recipe.schema import Recipe

PROGRAM = textwrap.dedent(
    """
    def describe_numerics(run):
        import os, torch
        from transformers import TrainingArguments
        torch.ones(512, 512) @ torch.ones(512, 512)
        return {
            "precision": torch.get_float32_matmul_precision(),
            "threads": torch.get_num_threads(),
            "processors": len(os.sched_getaffinity(0)),
            "asserts": __debug__,
        }
    """
)
LEFT_BEHIND = {
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",  # NVIDIA's images of PyTorch
    "MKL_NUM_THREADS": "1",  # beside OMP_NUM_THREADS in many batch scripts
    "MKL_DOMAIN_NUM_THREADS": "MKL_DOMAIN_ALL=1",
    "OMP_PROC_BIND": "spread",  # of many a cluster's profile
    "OMP_PLACES": "cores",
    "GOMP_CPU_AFFINITY": "0",
    "USE_TF": "1",
    "PYTHONOPTIMIZE": "2",
    "PYTHONINSPECT": "1",
}


def describe_numerics(place: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, **left: str) -> dict[str, Any]:
    (place / "stage_for_surroundings.py").write_text(PROGRAM)
    run = Run("run", recipe, place)
    run.save()
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(place))
        for name, value in left.items():
            patch.setenv(name, value)
        supervisor = Supervisor(StopRequest(), Limits(grace_s=10, hang_timeout_s=60, start_timeout_s=60))
        told = [{"OMP_NUM_THREADS": "2"}]
        verdict = supervisor.run("stage_for_surroundings:describe_numerics", run.folder, told)
    assert verdict.code == 0, verdict.reason
    return verdict.record


def test_what_images_and_sites_leave_behind_changes_neither_bits_nor_threads_nor_the_code(
    tmp_path: Path, smallest_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = describe_numerics(tmp_path, smallest_recipe, monkeypatch)
    assert (alone["precision"], alone["threads"]) == ("highest", 2)
    assert describe_numerics(tmp_path, smallest_recipe, monkeypatch, **LEFT_BEHIND) == alone


@pytest.mark.parametrize(("path", "kept"), [("", None), (":", None), (":/x", "/x"), ("/x::/y:", "/x:/y"), ("/x", "/x")])
def test_an_empty_entry_of_pythonpath_does_not_let_files_of_the_current_folder_be_run(
    path: str, kept: str | None
) -> None:
    assert inherit({"PYTHONPATH": path.replace(":", os.pathsep)}).get("PYTHONPATH") == kept


def test_what_a_user_sets_for_this_job_is_passed_on() -> None:
    own = {"AWS_REGION": "eu", "HF_TOKEN": "t", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "3", "WANDB_PROJECT": "p"}
    assert own.items() <= inherit(own).items()
