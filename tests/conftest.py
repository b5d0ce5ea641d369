"""Fixtures that more than one room's tests need: a real S3 server, and the quickstart's model and texts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.store.server import DEFAULT_BUCKET, serve


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A SeaweedFS of this test run's own, with AWS_* set to reach it; yields the URI of its bucket."""
    with serve(tmp_path_factory.mktemp("s3")) as variables, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield f"s3://{DEFAULT_BUCKET}"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with minilm-l6 and movie-reviews, made once per user and then kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "finetune-job" / "assets"
    subprocess.run([sys.executable, "-m", "job.data.assets", str(folder)], check=True)
    return folder
