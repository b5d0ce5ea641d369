"""What SLURM itself sends to a job: the signal before the time limit, and another start of the same job."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import (
    Case,
    Ended,
    check_finished,
    check_store,
    descendants,
    resumed_from,
    send,
    wait_for,
    wait_for_commit,
)
from slurm_daemons import Slurm, run_slurm

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with run_slurm() as slurm:
        yield slurm


BATCH = """#!/bin/bash
#SBATCH --time=2 --signal=B:USR1@60 --cpus-per-task=2
export LIGHT_STEP_S=$([ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] && echo 8 || echo 0.05)
{command} &
job=$!
trap 'kill -USR1 $job' USR1
wait $job
code=$?
while kill -0 $job 2>/dev/null; do wait $job; code=$?; done
echo "exit code $code of start ${{SLURM_RESTART_COUNT:-0}}" >> {codes}
[ $code = 75 ] && scontrol requeue $SLURM_JOB_ID
exit $code
"""


def submit(slurm: Slurm, place: Path, script: Path) -> str:
    """Return the job's id; what all of its starts print goes into one file."""
    options = ["--parsable", "--requeue", "--open-mode=append", f"--output={place}/log", f"--chdir={place}"]
    return slurm.call("sbatch", *options, str(script))


def wait_for_state(slurm: Slurm, job: str, *states: str, timeout_s: float = 150) -> dict[str, str]:
    deadline = time.monotonic() + timeout_s
    while (about := slurm.describe(job))["JobState"] not in states:
        assert time.monotonic() < deadline, about
        time.sleep(0.5)
    return about


def test_5_the_signal_before_the_time_limit_commits_75_and_the_requeued_job_finishes(
    slurm: Slurm, tmp_path: Path
) -> None:
    case, script, codes = Case(str(tmp_path / "store"), tmp_path), tmp_path / "job.sbatch", tmp_path / "codes"
    script.write_text(BATCH.format(command=" ".join(case.command("work")), codes=codes))
    job = submit(slurm, tmp_path, script)
    about = wait_for_state(slurm, job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    log = (tmp_path / "log").read_text()
    assert (about["JobState"], about["Restarts"]) == ("COMPLETED", "1"), log
    assert codes.read_text().splitlines() == ["exit code 75 of start 0", "exit code 0 of start 1"], log
    assert 2 <= (resumed_from(case) or 0) < 12, "the checkpoint of the step at which the signal came"
    result = next(line for line in reversed(log.splitlines()) if line.startswith('{"'))
    check_finished(case, Ended(0, json.loads(result), log))


def test_6_38_a_start_that_was_killed_with_its_node_is_followed_at_once_by_the_next(
    slurm: Slurm, tmp_path: Path
) -> None:
    """Its lease names another host and lasts ten minutes: only SLURM's count of starts tells that it is gone."""
    case = Case(str(tmp_path / "store"), tmp_path)
    script, marks = tmp_path / "job.sbatch", tmp_path / "marks"
    script.write_text(
        f"#!/bin/bash\necho start >> {marks}\n"
        f'[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] && export LIGHT_STEP_S=1\n'
        f"exec {' '.join(case.command('work', '--ttl=600'))}\n"
    )
    job = submit(slurm, tmp_path, script)
    wait_for_commit(case)
    owner = case.run.read_json("owner.json") or {}
    send(descendants(int(owner["pid"])), signal.SIGKILL)
    case.run.write_json("owner.json", (case.run.read_json("owner.json") or {}) | {"host": "node-that-died"})
    wait_for_state(slurm, job, "FAILED")
    committed = check_store(case)
    slurm.call("scontrol", "requeue", job)
    wait_for(lambda: marks.read_text().count("start") == 2)
    wait_for_state(slurm, job, "COMPLETED")
    assert (resumed_from(case) or 0) >= committed >= 2
