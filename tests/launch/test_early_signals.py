"""A stop signal in the first moments of `job run`, and the last word that Kubernetes shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.ending import fit_termination_message


def wait_until_caught(pid: int, number: signal.Signals) -> None:
    """Wait until the process handles the signal (proc(5), SigCgt): before its first line nobody can."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt"))
        if caught >> (number - 1) & 1:
            return
        time.sleep(0.002)


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8])
def test_a_stop_signal_at_any_early_moment_is_75_with_a_result_line(
    tmp_path: Path, assets: Path, delay_s: float
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(  # a good one: a bad one would end by itself, and truly so, before a late signal
        f"name: x\ntask: text-classification\nmodel: {{id: {assets}/minilm-l6}}\n"
        f"data: {{source: {assets}/movie-reviews}}\nstore: {{uri: {tmp_path}/store}}\n"
    )
    number = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)[round(delay_s * 100) % 3]
    process = subprocess.Popen(
        [sys.executable, "-m", "job", "run", str(recipe), "--work-dir", str(tmp_path / "work")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until_caught(process.pid, number)
    time.sleep(delay_s)
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    result = json.loads(stdout.strip().splitlines()[-1])
    assert (result["exit_code"], result["status"]) == (75, "interrupted")
    assert "Traceback" not in stderr
    assert not (tmp_path / "store").exists()


@given(
    st.dictionaries(st.sampled_from(["run_id", "status", "exit_code", "reason", "release", "x"]), st.text() | st.none())
)
def test_the_termination_message_is_whole_json_of_at_most_4096_bytes(result: dict[str, str | None]) -> None:
    for result_ in (result, result | {"reason": "ü😀\n" * 3000, "release": "\x00" * 5000, "run_id": "r" * 9000}):
        data = fit_termination_message(result_)
        assert len(data) <= 4096
        assert set(json.loads(data)) == {"run_id", "status", "exit_code", "reason", "release"}
