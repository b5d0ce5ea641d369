"""What a node or its surroundings can do to a real run (numbers as in the failure catalogue)."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, assert_refused, call_job, write_recipe

from job.store import RunStore
from job.store.commit import read_pointer

RUN = ("--run-id", "faulty")


def run(tmp_path: Path, recipe: dict[str, Any], **env: str) -> Answer:
    path = write_recipe(tmp_path / "recipe.yaml", **recipe)
    return call_job("run", str(path), *RUN, "--work-dir", str(tmp_path / "work"), env=env)


OWN_MOUNTS = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--user", "--map-root-user"])]
"""What is mounted after it, only the process that it starts sees."""


def run_on_mount(tmp_path: Path, recipe: dict[str, Any], options: str) -> Answer:
    """Run with a file system of its own for the work folder, which only that process sees."""
    if subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here (root, or user namespaces)")
    path, work = write_recipe(tmp_path / "recipe.yaml", **recipe), tmp_path / "mounted"
    work.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"'
    command = [*OWN_MOUNTS, "sh", "-c", script, str(work), sys.executable, "-m", "job", "run", str(path), *RUN]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--work-dir", str(work)], capture_output=True, text=True, env=environment, timeout=400
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def committed_step(recipe: dict[str, Any]) -> int:
    pointer = read_pointer(RunStore(recipe["store"]["uri"], "faulty").objects)
    return int(pointer["step"]) if pointer else 0


@pytest.mark.slow
@pytest.mark.parametrize("mib", [1, 9, 16, 18])
def test_14_16_a_disk_that_is_full_is_78_and_the_next_node_goes_on(
    tmp_path: Path, recipe: dict[str, Any], mib: int
) -> None:
    full = run_on_mount(tmp_path, recipe, f"size={mib}m")
    assert_refused(full, 78, "o space left on device")
    committed = committed_step(recipe)
    again = run(tmp_path, recipe)
    assert again.code == 0, again.stderr
    assert f"resuming from the checkpoint of step {committed}" in again.stderr or committed in (0, 6)


def test_15_a_disk_that_may_not_be_written_is_78(tmp_path: Path, recipe: dict[str, Any]) -> None:
    assert_refused(run_on_mount(tmp_path, recipe, "ro"), 78, "Read-only file system", "--work-dir")
    assert not Path(recipe["store"]["uri"]).exists()


def interrupt(tmp_path: Path, recipe: dict[str, Any]) -> None:
    """Leave a run with a committed checkpoint behind."""
    assert run(tmp_path, recipe, JOB_FAILPOINT="stage-record=kill").code == -9
    assert committed_step(recipe)


@pytest.mark.slow
def test_52_data_that_changed_between_two_attempts_are_16(
    tmp_path: Path, recipe: dict[str, Any], reviews: Path
) -> None:
    recipe["data"]["source"] = str(shutil.copytree(reviews, tmp_path / "rows"))
    interrupt(tmp_path, recipe)
    with (tmp_path / "rows/train.csv").open("a") as file:
        file.write("one more row,0\n")
    assert_refused(run(tmp_path, recipe), 16, "data", "--run-id")


@pytest.mark.slow
def test_53_a_loss_that_is_no_number_is_14_and_what_was_committed_stays(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["training"] |= {"learning_rate": 1e30, "max_grad_norm": 1e30, "max_steps": 40, "save_steps": 1}
    diverged = run(tmp_path, recipe)
    assert_refused(diverged, 14, "training.learning_rate")
    assert diverged.result["release"] is None
    assert committed_step(recipe) >= 1


@pytest.mark.slow
def test_70_nobody_who_reads_stdout_or_stderr_stops_no_training(tmp_path: Path, recipe: dict[str, Any]) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", **recipe)
    command = [sys.executable, "-m", "job", "run", str(path), *RUN, "--work-dir", str(tmp_path / "work")]
    reading, writing = os.pipe()
    process = subprocess.Popen(command, stdout=writing, stderr=writing, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    os.close(writing)
    os.close(reading)
    assert process.wait(timeout=300) == 0
    result = RunStore(recipe["store"]["uri"], "faulty").read_json("result.json") or {}
    assert result["exit_code"] == 0


def test_70_a_pipe_that_nobody_reads_changes_no_exit_code_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "job", "run", str(tmp_path / "there-is-no-recipe.yaml")]
    closed, full = os.pipe(), os.pipe()
    os.close(closed[0])
    os.set_blocking(full[1], False)
    with suppress(BlockingIOError):
        while True:
            os.write(full[1], b"x" * select.PIPE_BUF)
    os.set_blocking(full[1], True)
    for stdout, stderr in ((closed[1], subprocess.PIPE), (subprocess.PIPE, closed[1]), (subprocess.PIPE, full[1])):
        done = subprocess.run(command, stdout=stdout, stderr=stderr, timeout=60)
        assert done.returncode == 10
        assert done.stdout is None or b'"exit_code": 10' in done.stdout
    for closing in (">&-", "2>&-"):
        assert subprocess.run(["sh", "-c", f'exec "$@" {closing}', "sh", *command], timeout=60).returncode == 10


@pytest.mark.slow
def test_74_without_home_or_any_other_variable_it_works_in_the_work_folder_alone(
    tmp_path: Path, recipe: dict[str, Any]
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", **recipe)
    # the interpreter may live there itself
    at_home = Path(sys.executable).resolve().is_relative_to(Path.home())
    hide = 'exec env -i "$@"' if at_home else 'mount -t tmpfs -o ro tmpfs "${HOME:-/root}"; exec env -i "$@"'
    command = [sys.executable, "-m", "job", "run", str(path), *RUN, "--work-dir", str(tmp_path / "work")]
    done = subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", hide, "sh", "HF_HUB_OFFLINE=1", *command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("Traceback|Permission denied|Read-only", done.stderr)
