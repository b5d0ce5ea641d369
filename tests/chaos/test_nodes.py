"""Two nodes of one run, each with a supervisor, a disk and ranks of its own: joining, stopping, dying, misfits.

Light runs (`light.py`) on loopback; what SLURM and two network hosts do to it stands in `cluster/`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from cases import (
    Case,
    Ended,
    check_finished,
    check_store,
    descendants,
    end,
    resumed_from,
    send,
    wait_for,
    wait_for_commit,
)

from job.errors import NotFound

SLOW = {"LIGHT_STEP_S": "0.5"}


class TwoNodes:
    """One run on two nodes; every start of both meets at a port of its own."""

    def __init__(self, place: Path) -> None:
        self.case = Case(str(place / "store"), place, ranks=2)
        self._place, self._starts, self.port = place, 0, 0

    def start(self, *words: str, **variables: str) -> list[subprocess.Popen[str]]:
        """Start both nodes; their disks are those of the start before."""
        self.choose_port()
        return [self.start_one(rank, *words, **variables) for rank in (0, 1)]

    def is_first_listening(self) -> bool:
        """Tell whether node 0 can be called; it hangs up on a stranger."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5):
            return True
        return False

    def choose_port(self) -> None:
        self._starts += 1
        with socket.create_server(("", 0)) as probe:
            self.port = probe.getsockname()[1]

    def start_one(self, rank: int, *words: str, **variables: str) -> subprocess.Popen[str]:
        options = [f"--node-rank={rank}", "--nodes=2", f"--port={self.port}", "--ranks=1", *words]
        votes = self._place / f"votes-of-start-{self._starts}"
        return self.case.start(f"node-{rank}", *options, LIGHT_VOTES=str(votes), **variables)

    def run(self, *words: str) -> list[Ended]:
        return [end(process) for process in self.start(*words)]

    @property
    def votes(self) -> Path:
        """Where the ranks of the first attempt of this start vote."""
        return self._place / f"votes-of-start-{self._starts}" / "votes-1"

    def check_resumed(self, least: int = 2) -> None:
        """Assert that the next start goes on from what is committed, to the state of an uninterrupted run."""
        committed = check_store(self.case)
        first, second = self.run()
        assert second.code == 0, second.stderr
        check_finished(self.case, first)
        assert (resumed_from(self.case) or 0) >= committed >= least


@pytest.fixture
def nodes(tmp_path: Path) -> TwoNodes:
    return TwoNodes(tmp_path)


def test_two_nodes_train_together_and_the_first_releases(nodes: TwoNodes) -> None:
    first, second = nodes.run()
    check_finished(nodes.case, first)
    assert (second.code, second.result["status"]) == (0, "trained"), second.stderr


def test_nodes_on_one_shared_disk_do_not_share_the_runs_folder(nodes: TwoNodes, tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"node-{rank}").symlink_to(tmp_path / "shared", target_is_directory=True)
    (tmp_path / "shared").mkdir()
    first, second = nodes.run()
    check_finished(nodes.case, first)
    assert second.code == 0, second.stderr
    assert (tmp_path / "shared/runs/run-1/result.json").read_text().count('"released"') == 1, "node 0's own"


@pytest.mark.parametrize("killed", [0, 1])
def test_a_node_that_dies_makes_the_other_leave_with_79_and_both_go_on_together(nodes: TwoNodes, killed: int) -> None:
    processes = nodes.start("--ttl=1", **SLOW)
    wait_for_commit(nodes.case)
    send(descendants(processes[killed].pid), signal.SIGKILL)
    survivor, _ = end(processes[1 - killed]), end(processes[killed])
    assert survivor.code == 79, survivor.stderr
    assert f"node {killed}" in survivor.result["reason"]
    nodes.check_resumed()


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_node_stops_both_at_the_same_step_with_75(nodes: TwoNodes, told: int) -> None:
    processes = nodes.start(**SLOW)
    wait_for_commit(nodes.case)
    os.kill(processes[told].pid, signal.SIGTERM)
    assert [end(process).code for process in processes] == [75, 75]
    nodes.check_resumed()


@pytest.mark.parametrize("slow", [0, 1])
def test_nodes_that_agreed_to_stop_wait_for_the_slower_ones_upload(nodes: TwoNodes, slow: int) -> None:
    """The faster one has left by then; were the other told again, it would give its upload up."""
    nodes.choose_port()
    sleep = {"JOB_FAILPOINT": "files-uploaded=sleep:3"}
    processes = [nodes.start_one(rank, "--save-steps=100", **SLOW, **sleep if rank == slow else {}) for rank in (0, 1)]
    wait_for(lambda: all((nodes.votes / f"rank-0000{rank}").exists() for rank in (0, 1)))
    os.kill(processes[slow].pid, signal.SIGTERM)
    assert [end(process).code for process in processes] == [75, 75]
    assert check_store(nodes.case) >= 1
    nodes.check_resumed(least=1)


@pytest.mark.parametrize("small", [0, 1])
def test_too_many_rows_for_one_nodes_gpu_are_fewer_on_all_at_the_next_try(nodes: TwoNodes, small: int) -> None:
    """The other one's ranks hang meanwhile, and the next try lasts longer than their end is waited for."""
    nodes.choose_port()
    little = {"LIGHT_FITTING_ROWS": "8", "LIGHT_STEP_S": "1"}
    processes = [nodes.start_one(rank, **little if rank == small else {"LIGHT_STEP_S": "1"}) for rank in (0, 1)]
    first, second = [end(process) for process in processes]
    check_finished(nodes.case, first)
    assert second.code == 0, second.stderr
    assert "Trying again from the last committed checkpoint with training.max_micro_batch_size: 8" in first.stderr


def test_a_node_that_hangs_makes_the_other_leave_with_79(nodes: TwoNodes) -> None:
    processes = nodes.start("--hang-timeout=3", "--ttl=1", **SLOW)
    wait_for_commit(nodes.case)
    send(descendants(processes[1].pid), signal.SIGSTOP)
    first = end(processes[0])
    send(descendants(processes[1].pid), signal.SIGKILL)
    assert first.code == 79, first.stderr
    end(processes[1])
    nodes.check_resumed()


def test_after_the_training_node_0_goes_on_alone_and_a_restart_needs_nobody_else(nodes: TwoNodes) -> None:
    first, second = (end(p) for p in nodes.start(JOB_FAILPOINT="stage-run=kill@2"))
    assert first.code == -signal.SIGKILL, "killed in the stage after the training"
    assert second.code == 0, second.stderr
    alone = end(nodes.start_one(0))
    check_finished(nodes.case, alone)
    late = end(nodes.start_one(1))
    assert (late.code, late.result["status"]) == (0, "trained"), late.stderr


def test_a_node_that_dies_before_the_training_is_waited_for(nodes: TwoNodes) -> None:
    first, second = nodes.start()
    send(descendants(second.pid), signal.SIGKILL)
    end(second)
    time.sleep(1)
    again = nodes.start_one(1)
    check_finished(nodes.case, end(first))
    assert end(again).code == 0


@pytest.mark.parametrize("unlucky", [0, 1])
def test_what_one_node_finds_wrong_for_good_is_every_nodes_code(nodes: TwoNodes, unlucky: int) -> None:
    nodes.choose_port()
    bad = nodes.start_one(unlucky, LIGHT_BAD_ROW="7")
    time.sleep(3)  # it is ready to leave before the other one listens
    other = nodes.start_one(1 - unlucky)
    assert [end(process).code for process in (other, bad)] == [11, 11]


@pytest.mark.parametrize(
    ("option", "gpus", "code", "word"),
    [("--steps=24", "0", 10, "another recipe"), ("--ranks=0", "0,1", 78, "GPUs differ")],
)
def test_nodes_that_differ_do_not_train(nodes: TwoNodes, option: str, gpus: str, code: int, word: str) -> None:
    nodes.choose_port()
    first = nodes.start_one(0, "--ranks=0", CUDA_VISIBLE_DEVICES="0")
    second = nodes.start_one(1, "--ranks=0", option, CUDA_VISIBLE_DEVICES=gpus)
    ended = [end(first), end(second)]
    assert [each.code for each in ended] == [code, code], ended
    assert word in ended[0].result["reason"]
    with pytest.raises(NotFound):
        resumed_from(nodes.case)


def test_a_node_that_comes_again_while_the_first_fetches_takes_part(nodes: TwoNodes) -> None:
    processes = nodes.start(**SLOW)
    wait_for_commit(nodes.case)
    os.kill(processes[0].pid, signal.SIGTERM)
    assert [end(process).code for process in processes] == [75, 75]
    nodes.choose_port()
    first = nodes.start_one(0, JOB_FAILPOINT="resume-fetch=sleep:6")
    second = nodes.start_one(1)
    time.sleep(4)
    send(descendants(second.pid), signal.SIGKILL)
    end(second)
    again = nodes.start_one(1)
    check_finished(nodes.case, end(first))
    assert end(again).code == 0


def test_a_first_node_that_is_stopped_before_the_start_takes_the_other_along_with_75(nodes: TwoNodes) -> None:
    first, second = nodes.start(JOB_FAILPOINT="resume-fetch=sleep:8")
    wait_for(nodes.is_first_listening)
    time.sleep(2)
    os.kill(first.pid, signal.SIGTERM)
    assert [end(process).code for process in (first, second)] == [75, 75]


def test_a_stranger_who_calls_neither_joins_nor_disturbs(nodes: TwoNodes) -> None:
    processes = nodes.start(**SLOW)
    wait_for_commit(nodes.case)
    for words in (
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"kind": "hello", "run": "other", "recipe": "", "processes": 1, "rank": 1}\n',
        b'{"kind": "hello", "rank": 1}\n[]\n',
        b'{"kind": "hello", "run": "run-1", "rank": Infinity}\n',
        b'{"kind": "hello", "run": "run-1", "rank": "1"}\n',
        b"[" * 5000 + b"\n",
        b"\xff" * 100,
        b"x" * (3 << 20),
    ):
        with socket.create_connection(("127.0.0.1", nodes.port)) as stranger:
            stranger.sendall(words)
    ended = [end(process) for process in processes]
    check_finished(nodes.case, ended[0])
    assert ended[1].code == 0, ended[1].stderr
