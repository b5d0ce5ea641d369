"""The work folder of a node that others use as well: SLURM's default lies below /tmp, on every node of a job."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from job.errors import SecurityRefused
from job.work_folder import make_work_folder, refuse_foreign

NOBODY = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to somebody else")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder such as /tmp."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def test_nobody_else_reads_what_a_run_leaves_below_tmp(shared: Path) -> None:
    make_work_folder(shared / "work")
    assert stat.S_IMODE((shared / "work").stat().st_mode) == 0o700
    make_work_folder(shared / "work")
    make_work_folder(shared / "mine" / "work")
    assert stat.S_IMODE((shared / "mine").stat().st_mode) == 0o700


def test_elsewhere_the_umask_decides_as_always(tmp_path: Path) -> None:
    make_work_folder(tmp_path / "team" / "work")
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "team" / "work").stat().st_mode == (tmp_path / "usual").stat().st_mode


@needs_root
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_folder_that_somebody_else_has_laid_there_before_is_refused_on_every_node(shared: Path, rank: str) -> None:
    work, recipe = shared / "work", shared / "recipe.yaml"
    work.mkdir()
    os.chown(work, NOBODY, NOBODY)
    recipe.write_text(
        f"name: x\ntask: text-classification\nmodel: {{id: m}}\ndata: {{source: d}}\nstore: {{uri: {shared}/s}}\n"
    )
    node = {"PET_NNODES": "2", "PET_NODE_RANK": rank, "PET_MASTER_ADDR": "127.0.0.1", "JOB_RUN_ID": "run-1"}
    command = [sys.executable, "-m", "job", "run", str(recipe), "--work-dir", str(work)]
    done = subprocess.run(command, env=os.environ | node, capture_output=True, text=True, timeout=60)
    assert done.returncode == 19, done.stderr
    assert "belongs to somebody else" in done.stderr
    assert not list(work.iterdir()), "they could lead elsewhere by a link what is written there"
    if rank == "0":
        assert json.loads(done.stdout.splitlines()[-1])["exit_code"] == 19


@needs_root
def test_a_team_that_shares_a_work_folder_with_nobody_else_may_go_on(tmp_path: Path) -> None:
    work = tmp_path / "team"
    for folder in (work, work / "runs", work / "cache"):
        folder.mkdir()
    work.chmod(0o3770)  # who is in the group may add, and take away what is theirs
    os.chown(work / "runs", NOBODY, NOBODY)
    make_work_folder(work)


@needs_root
def test_a_project_whose_folder_somebody_else_owns_has_guests(shared: Path) -> None:
    (shared / "project").mkdir()
    os.chown(shared / "project", NOBODY, NOBODY)
    make_work_folder(shared / "project" / "work")


@needs_root
def test_a_link_laid_there_by_somebody_else_is_refused(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (shared / "work").symlink_to(tmp_path / "mine")
    os.chown(shared / "work", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(SecurityRefused):
        make_work_folder(shared / "work")


@needs_root
def test_a_volume_of_a_pod_may_belong_to_anybody(tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    os.chown(volume, NOBODY, NOBODY)
    make_work_folder(volume)


def test_in_a_folder_that_everybody_may_write_to_what_is_read_back_is_the_runs_own(shared: Path) -> None:
    for _ in range(2):
        make_work_folder(shared)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in shared.iterdir()} == {
        "runs": 0o700,
        "cache": 0o700,
    }


@needs_root
@pytest.mark.parametrize("name", ["runs", "cache"])
def test_a_folder_that_everybody_may_write_to_is_refused_where_somebody_else_has_laid_what_is_read_back(
    shared: Path, name: str
) -> None:
    (shared / name).mkdir()
    os.chown(shared / name, NOBODY, NOBODY)
    for act in (refuse_foreign, make_work_folder):
        with pytest.raises(SecurityRefused, match=f"{name} belongs to somebody else"):
            act(shared)
