"""A run's folder belongs to one process at a time, and nothing of the dead is left beside it."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from job.recipe import Run
from job.recipe.schema import Recipe

HOLD = """
import sys
from pathlib import Path
from job.recipe import Run
print(Run("r", None, Path(sys.argv[1])).lock_folder().folder.name, flush=True)
sys.stdin.read()
"""


def hold(work: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", HOLD, str(work)], stdin=pipe, stdout=pipe, text=True)


def read_name(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_each_living_process_has_a_folder_of_its_own_and_those_of_the_dead_go(tmp_path: Path) -> None:
    holders = [hold(tmp_path) for _ in range(2)]
    names = sorted(map(read_name, holders))
    assert names[0] == "r"
    assert names[1].startswith("r~")
    third = hold(tmp_path)
    assert read_name(third) not in names
    for holder in (*holders, third):
        holder.kill()
        holder.communicate()
    last = hold(tmp_path)
    assert read_name(last) == "r"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["r"]
    last.communicate()


def test_on_a_shared_disk_without_locks_no_node_takes_another_nodes_folder_away(
    tmp_path: Path, smallest_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = Run("r", smallest_recipe, tmp_path)
    other = run.lock_folder(node_rank=1)
    other.save()
    assert run.lock_folder().folder == run.folder
    assert Run.load(other.folder) == other


def test_a_private_folder_is_found_again_by_the_stages(tmp_path: Path, smallest_recipe: Recipe) -> None:
    run = Run("r", smallest_recipe, tmp_path, "r~1")
    run.save()
    assert Run.load(run.folder) == run
    assert run.cache == tmp_path / "cache"
