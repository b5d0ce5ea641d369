"""What a command imports before it answers; each module that it does not need is time that somebody waits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch", "transformers", "accelerate", "datasets", "optimum", "deepspeed", "peft", "onnx", "onnxruntime", "sklearn",
    "tokenizers", "huggingface_hub", "boto3", "botocore", "scipy", "pandas", "numpy", "pydantic", "yaml", "rich",
}  # fmt: skip
RECIPE_NEEDS = {"pydantic", "yaml"}


def list_heavy(*words: object) -> set[str]:
    """Return which heavy libraries a call of `job` imports, by what Python itself says of it."""
    command = [sys.executable, "-X", "importtime", "-m", "job", *map(str, words)]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in said.splitlines() if "|" in line}
    assert "typer" in imported
    return imported & HEAVY


def test_help_imports_nothing_heavy() -> None:
    assert list_heavy("--help") == set()


@pytest.mark.parametrize("words", [["run", "--help"], ["predict", "--help"], ["predict", "--no-such-option"], ["runn"]])
def test_a_verbs_help_and_a_wrong_command_import_only_what_typer_draws_in(words: list[str]) -> None:
    assert list_heavy(*words) <= {"pydantic"}


@pytest.mark.parametrize("verb", ["run", "check"])
def test_a_bad_recipe_is_refused_by_what_reads_recipes_alone(verb: str, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("name: x\ntask: text-classification\nlerning_rate: 1\n")
    assert list_heavy(verb, recipe, "--work-dir", tmp_path) == RECIPE_NEEDS
