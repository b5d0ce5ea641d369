"""A training is seen while it goes on: in its log, from the store, and by the trackers that the recipe names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from conftest import assert_refused, call_job, write_recipe
from trainings import Trial


def test_a_running_training_is_followed_from_the_store(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["training"] |= {"max_steps": 20_000, "save_steps": 20_000, "eval_steps": 20_000, "logging_steps": 5}
    path, uri = write_recipe(tmp_path / "recipe.yaml", **recipe), f"{tmp_path / 'store'}/runs/live"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "job", "run", str(path), "--run-id", "live", "--work-dir", str(tmp_path / "work")]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, env=environment)
        deadline = time.monotonic() + 120
        while '"step": 5,' not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        follow = [sys.executable, "-m", "job", "show", uri, "--follow"]
        following = subprocess.Popen(follow, stdout=subprocess.PIPE, text=True, env=environment)
        assert following.stdout is not None
        seen = next(line for line in following.stdout if "  train  step " in line and "loss" in line)
        shown = call_job("show", uri).stdout
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=120) == 75
        following.kill()
    assert "/20000, " in seen and " left, " in seen and "tokens_per_second" in seen
    assert "progress\tstep " in shown
    assert "progress" not in json.loads((tmp_path / "store/runs/live/status.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    assert [line["step"] for line in lines] == list(range(5, 5 * len(lines) + 1, 5))
    assert set(lines[0]) >= {"time", "step", "steps", "percent", "left_s", "loss", "learning_rate", "grad_norm"}


def test_a_tracker_that_is_not_installed_is_refused_before_anything_begins(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", **recipe)
    for verb in (("check", str(path), "--offline"), ("run", str(path), "--work-dir", str(tmp_path / "work"))):
        answer = call_job(*verb, "--set", "training.report_to=[mlflow]")
        assert_refused(answer, 10, "training.report_to: mlflow", "pip install mlflow")
    assert not (tmp_path / "store").exists()


def test_tensorboard_gets_the_curves_of_all_attempts_from_one_rank(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["training"] |= {"report_to": ["tensorboard"], "logging_steps": 1, "max_steps": 30, "eval_steps": 30}
    recipe["distributed"] = {"processes_per_node": 2}
    trial = Trial(write_recipe(tmp_path / "recipe.yaml", **recipe), tmp_path)
    assert trial.attempt(accident="training_step:term:4") == 75, trial.reason
    assert trial.attempt() == 0, trial.reason
    events = list(trial.run().folder.glob("tensorboard/events*"))
    assert len(events) == 2
    for tag in ("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second"):
        assert all(tag.encode() in file.read_bytes() for file in events)
