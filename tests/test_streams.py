"""A verb ends as it should whatever its stdin, stdout and stderr are: closed, or of an encoding that lacks a letter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from job.store import open_store


def call_job(redirection: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m job` with what a shell does by `redirection`."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "job", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


@pytest.mark.parametrize("redirection", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("verb", ["schema", "check", "show"])
def test_a_closed_stream_does_not_turn_success_into_failure(verb: str, redirection: str, tmp_path: Path) -> None:
    open_store(str(tmp_path)).write("runs/run-1/run.json", b"{}")
    words = {"check": ["quickstart", "--offline"], "show": [str(tmp_path)]}.get(verb, [])
    done = call_job(redirection, verb, *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert bool(done.stdout) == (">&-" not in redirection.replace("2>&-", ""))


def test_a_closed_stream_does_not_hide_how_a_verb_failed(tmp_path: Path) -> None:
    assert call_job("<&- >&- 2>&-", "show", str(tmp_path)).returncode == 13
    assert call_job("<&- >&- 2>&-", "nonsense").returncode == 2


def test_a_letter_that_the_locale_lacks_is_escaped() -> None:
    done = call_job("", "check", "quickstart", "--offline", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"\xd7" in done.stdout
