"""Where nothing but the work folder may be written to, libraries still find a place for their temporary files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from job.work_folder import provide_temporary_folder


def test_a_system_without_a_temporary_folder_gets_one_in_the_work_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "/proc")
    provide_temporary_folder(tmp_path / "work")
    found = [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"]
    started = subprocess.run(found, capture_output=True, text=True, check=True, cwd="/")
    assert started.stdout.strip() == tempfile.gettempdir() == str(tmp_path / "work" / "tmp")


def test_one_that_is_there_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    provide_temporary_folder(tmp_path / "work")
    assert os.environ["TMPDIR"] == str(tmp_path)
    assert not (tmp_path / "work").exists()
