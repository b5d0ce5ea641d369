"""What a command imports before it answers; each module that it does not need is time that somebody waits."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from job.data import fetch_sources
from job.launch import Limits, Place, StopRequest, Supervisor, find_free_port, find_topology
from job.recipe import Run
from job.recipe.schema import Recipe
from job.stages import FETCH, STAGES
from job.store import Manifest, ManifestEntry, RunStore
from job.training import list_environments

HEAVY = {
    "torch", "transformers", "accelerate", "datasets", "optimum", "deepspeed", "peft", "onnx", "onnxruntime", "sklearn",
    "tokenizers", "huggingface_hub", "boto3", "botocore", "scipy", "pandas", "numpy", "pydantic", "yaml", "rich",
}  # fmt: skip
RECIPE_NEEDS = {"pydantic", "yaml"}


def list_heavy(*words: object) -> set[str]:
    """Return which heavy libraries a call of `job` imports, by what Python itself says of it."""
    command = [sys.executable, "-X", "importtime", "-m", "job", *map(str, words)]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    imported = read_imports(said)
    assert "typer" in imported
    return imported & HEAVY


def read_imports(said: str) -> set[str]:
    """Return which packages were imported, by what Python says under -X importtime."""
    return set(re.findall(r"^import time: +\d+ \| +\d+ \| *(\w+)", said, re.MULTILINE))


def list_heavy_of_stage(target: str, run: Run, environment: dict[str, str]) -> set[str]:
    """Return which heavy libraries a stage imports that the supervisor runs, beside those that read recipes."""
    supervisor = Supervisor(StopRequest(), Limits.of(run.recipe.launch))
    verdict = supervisor.run(target, run.folder, [environment | {"PYTHONPROFILEIMPORTTIME": "1"}])
    assert verdict.code == 0, verdict
    imported = read_imports((run.folder / "logs" / f"{target.rpartition(':')[2]}-0.log").read_text())
    assert "job" in imported
    return imported & HEAVY


def test_help_imports_nothing_heavy() -> None:
    assert list_heavy("--help") == set()


@pytest.mark.parametrize("words", [["run", "--help"], ["predict", "--help"], ["predict", "--no-such-option"], ["runn"]])
def test_a_verbs_help_and_a_wrong_command_import_only_what_typer_draws_in(words: list[str]) -> None:
    assert list_heavy(*words) <= {"pydantic"}


def test_a_store_is_verified_without_what_reads_recipes(tmp_path: Path) -> None:
    manifest = Manifest("release", {"file": ManifestEntry(7, hashlib.sha256(b"content").hexdigest(), "file")})
    release = tmp_path / f"1-{manifest.sha256[:8]}"
    release.mkdir()
    (release / "file").write_bytes(b"content")
    (release / "manifest.json").write_bytes(manifest.to_bytes())
    verify = ("verify", release, "--work-dir", tmp_path / "work")
    assert subprocess.run([sys.executable, "-m", "job", *map(str, verify)]).returncode == 0
    assert list_heavy(*verify) <= {"pydantic"}  # which typer imports


@pytest.mark.parametrize("verb", ["run", "check"])
def test_a_bad_recipe_is_refused_by_what_reads_recipes_alone(verb: str, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("name: x\ntask: text-classification\nlerning_rate: 1\n")
    assert list_heavy(verb, recipe, "--work-dir", tmp_path) == RECIPE_NEEDS


def test_ranks_are_started_before_anything_is_imported_that_they_need_not_wait_for() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "import job.opening"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert read_imports(said) & HEAVY == RECIPE_NEEDS
    own = set(re.findall(r"\| *(job\.[\w.]+)$", said, re.MULTILINE))
    assert "job.opening" in own
    assert not own & {f"job.{later}" for later in ("data", "export", "pipeline", "report", "store.s3", "tasks")}


def make_run(folder: Path, assets: Path, reviews: Path) -> Run:
    """Return a run of one step whose data and tokens are known on this node."""
    recipe = {
        "name": "x",
        "task": "text-classification",
        "model": {"id": str(assets / "minilm-l6")},
        "data": {"source": str(reviews), "max_length": 16},
        "training": {"max_steps": 1, "eval_steps": 1000, "global_batch_size": 4},
        "distributed": {"engine": "ddp"},
        "store": {"uri": str(folder / "store")},
    }
    run = Run("x", Recipe.model_validate(recipe), folder / "work")
    run.save()
    fetch_sources(run)
    return run


def test_known_data_are_fetched_and_a_rank_is_started_without_what_neither_needs(
    tmp_path: Path, assets: Path, reviews: Path
) -> None:
    run = make_run(tmp_path, assets, reviews)
    assert list_heavy_of_stage(FETCH, run, {}) == {"numpy"}

    order = {"epoch": 1, "nonce": f"{1:032x}", "keep": 2, "peer_timeout_s": 60}
    RunStore.of(run).write_json("owner.json", order)  # committing asks who owns the run
    run.write("attempt.json", order | {"resume": None, "resumed_from": None, "about": {"engine": "ddp"}})
    (environment,) = list_environments(run, find_topology(run.recipe.distributed, Place()), find_free_port(), None)
    needed = {"torch", "transformers", "accelerate", "tokenizers", "huggingface_hub", "numpy"}
    assert list_heavy_of_stage(STAGES[0].target, run, environment) == needed
