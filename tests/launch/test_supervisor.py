"""The supervisor keeps exit codes, leaves no process behind, and passes signals on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from job.launch import StopRequest, Supervisor, find_topology
from job.launch.supervisor import Verdict
from job.recipe import Run
from job.recipe.schema import Distributed, Recipe

PROGRAM = textwrap.dedent(
    """
    import os, signal, sys, time
    from job.errors import GateFailed, Interrupted, Unreachable
    def rank(): return int(os.environ.get("RANK", 0))
    def fine(run): return {"rank": rank()}
    def refuse(run): raise GateFailed("the gate said no")
    def crash(run): raise ZeroDivisionError("a bug")
    def leave(run): os._exit(75)
    def segfault(run): os.kill(os.getpid(), signal.SIGSEGV)
    def one_is_killed(run):
        if rank() == 1: os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    def one_refuses(run):
        if rank() == 1: raise GateFailed("rank 1 said no")
        time.sleep(600)
    def with_child(run):
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (run.folder / "child.pid").write_text(str(child.pid))
        time.sleep(600)
    """
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stage_for_tests.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "task": "text-classification",
            "model": {"id": "x"},
            "data": {"source": "x"},
            "store": {"uri": "x"},
        }
    )
    run = Run("run", recipe, tmp_path)
    run.save()
    return run.folder


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    }
    yield StopRequest()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def supervise(function: str, folder: Path, stop: StopRequest, ranks: int = 1, grace_s: float = 5) -> Verdict:
    environments = [{"RANK": str(rank)} for rank in range(ranks)]
    return Supervisor(stop, grace_s).run(f"stage_for_tests:{function}", folder, environments)


@pytest.mark.parametrize(
    ("function", "ranks", "code", "words"),
    [
        ("fine", 2, 0, ""),
        ("refuse", 1, 15, "the gate said no"),
        ("crash", 1, 1, "ZeroDivisionError"),
        ("leave", 1, 1, "exit code 75"),
        ("segfault", 1, 1, "SIGSEGV"),
        ("one_is_killed", 2, 79, "SIGKILL"),
        ("one_refuses", 3, 15, "rank 1 said no"),
    ],
)
def test_the_code_is_that_of_the_process_that_failed(
    function: str, ranks: int, code: int, words: str, folder: Path, stop: StopRequest
) -> None:
    verdict = supervise(function, folder, stop, ranks)
    assert (verdict.code, words in verdict.reason) == (code, True), verdict


def test_the_record_is_that_of_the_first_process(folder: Path, stop: StopRequest) -> None:
    assert supervise("fine", folder, stop, 3).record == {"rank": 0}


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} is still there")


def test_a_killed_supervisor_takes_its_processes_with_it(folder: Path, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from job.launch import StopRequest, Supervisor\n"
        f"Supervisor(StopRequest(), 5).run('stage_for_tests:one_refuses', Path({str(folder)!r}), [{{}}])"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"RANK": "0"})
    log = folder / "logs" / "one_refuses-0.log"
    deadline = time.monotonic() + 30
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = [int(pid) for pid in Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()]
    assert workers
    supervisor.kill()
    supervisor.wait()
    for pid in workers:
        wait_until_gone(pid)


def test_what_a_worker_started_is_gone_as_well(folder: Path, stop: StopRequest) -> None:
    import threading

    def ask_to_stop() -> None:
        deadline = time.monotonic() + 30
        while not (folder / "child.pid").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask_to_stop)
    thread.start()
    verdict = supervise("with_child", folder, stop, grace_s=10)
    thread.join()
    assert verdict.code == 75
    wait_until_gone(int((folder / "child.pid").read_text()))


def test_without_a_gpu_auto_is_one_rank_and_ranks_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_topology(Distributed()).world_size == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert find_topology(Distributed()).world_size == 3
    environments: list[dict[str, Any]] = list(find_topology(Distributed(processes_per_node=2)).rank_environments())
    assert [variables["RANK"] for variables in environments] == ["0", "1"]
    assert len({variables["MASTER_PORT"] for variables in environments}) == 1
