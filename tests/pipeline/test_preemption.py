"""A stop signal ends a training with a committed checkpoint and 75; the next attempt goes on from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import call_job, write_recipe


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sigterm_commits_a_checkpoint_and_the_next_attempt_resumes(
    recipe: dict[str, Any], tmp_path: Path, ranks: int
) -> None:
    recipe["training"] |= {"max_steps": 400, "save_steps": 400, "eval_steps": 400, "logging_steps": 5}
    recipe["distributed"] = {"processes_per_node": ranks}
    path = write_recipe(tmp_path / "recipe.yaml", **recipe)
    words = ["run", str(path), "--run-id", "preempted", "--work-dir", str(tmp_path / "work")]
    process = subprocess.Popen(
        [sys.executable, "-m", "job", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if '"step": 10, "steps": 400' in line:
            process.send_signal(signal.SIGTERM)
            break
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    result = json.loads(stdout.strip().splitlines()[-1])
    assert (result["exit_code"], result["status"]) == (75, "interrupted")
    assert not (tmp_path / "store" / "models").exists()
    pointer = json.loads((tmp_path / "store" / "runs" / "preempted" / "current.json").read_text())
    assert 10 <= pointer["step"] < 400

    again = call_job(*words)
    assert again.code == 0, again.stderr
    assert again.result["train"]["resumed_from"] == pointer["step"]
    assert again.result["train"]["steps"] == 400
