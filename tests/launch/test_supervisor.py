"""The supervisor keeps exit codes, leaves no process behind, and passes signals on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from job.errors import Fenced
from job.launch import Limits, Place, StopRequest, Supervisor, find_topology
from job.launch.memory import MemoryWatch
from job.launch.supervisor import Verdict, _read_saving_s
from job.launch.topology import Topology
from job.recipe import Run
from job.recipe.schema import Distributed, Recipe

PROGRAM = textwrap.dedent(
    """
    import os, signal, sys, threading, time
    from job.errors import GateFailed, Interrupted, Unreachable
    def rank(): return int(os.environ.get("RANK", 0))
    if "IMPORTED" in os.environ: open(os.environ["IMPORTED"], "w").write(str(os.getpid()))
    def fine(run): return {"rank": rank()}
    def say_who(run): return {"pid": os.getpid(), "color": os.environ.get("COLOR")}
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
    def storm():
        def send():
            for _ in range(2000): os.kill(os.getpid(), signal.SIGTERM)
        threading.Thread(target=send, daemon=True).start()
    def end_in_a_storm(run):
        storm()
        return {}
    def fail_in_a_storm(run):
        storm()
        raise Interrupted("told to stop")
    def note(run, name, text=""):
        (run.folder / f"{name}-{rank()}.txt").write_text(text or str(os.getpid()))
    def wait(run):
        note(run, "ready")
        time.sleep(600)
    def be_debugged(run):
        # whoever is traced ends for its parent when the debugger has looked, as one in state D when its disk answers
        import ctypes
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # any process may trace this one
        program = "import ctypes, os, sys, time; PTRACE_SEIZE, pid = 0x4206, int(sys.argv[1]); "
        program += "held = ctypes.CDLL(None).ptrace(PTRACE_SEIZE, pid, None, None); "
        program += "print(0 if held else os.getpid(), flush=True); time.sleep(40)"
        command = [sys.executable, "-c", program, str(os.getpid())]
        import subprocess
        debugger = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        note(run, "debugger", debugger.stdout.readline().decode().strip())
        time.sleep(600)
    def one_is_debugged(run):
        if rank() == 0: be_debugged(run)
        note(run, "ready")
        while rank() == 1 and not (run.folder / "debugger-0.txt").exists(): time.sleep(0.02)
        if rank() == 1: os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    def wait_politely(run):
        told = []
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda *_: told.append(1))
        note(run, "ready")
        while not told: time.sleep(0.02)
        note(run, "saved")
        raise Interrupted("stopped with a checkpoint")
    def ignore_everything(run):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2): signal.signal(number, signal.SIG_IGN)
        note(run, "ready")
        time.sleep(600)
    def hang(run):
        from job.liveness import beat
        beat()
        time.sleep(600)
    def work_long(run):
        time.sleep(6)
        return {}
    def speak(run):
        import logging
        for number in range(20_000): logging.getLogger("job.test").info("line %d of a log that nobody reads", number)
        return {"spoken": number}
    def refuse_beside_a_thread(run):
        threading.Thread(target=time.sleep, args=(600,)).start()
        raise GateFailed("the gate said no")
    def agree_then_upload(run):
        told = []
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda *_: told.append(1))
        note(run, "ready")
        if rank() == 0:
            deadline = time.monotonic() + 4
            while time.monotonic() < deadline and not told: time.sleep(0.02)
            note(run, "told" if told else "uploaded")
        raise Interrupted("stopped with a checkpoint", together=True)
    def upload_when_told(run):
        from job.liveness import beat
        told = []
        signal.signal(signal.SIGTERM, lambda *_: told.append(1))
        note(run, "ready")
        deadline = time.monotonic() + 60
        while not told and time.monotonic() < deadline: beat(); time.sleep(0.02)
        told.clear()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not told: beat(); time.sleep(0.02)
        note(run, "told-again" if told else "uploaded")
        raise Interrupted("stopped with a checkpoint")
    def with_child(run):
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (run.folder / "child.pid").write_text(str(child.pid))
        time.sleep(600)
    """
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smallest_recipe: Recipe) -> Path:
    (tmp_path / "stage_for_tests.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = Run("run", smallest_recipe, tmp_path)
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


LIMITS = Limits(grace_s=10, hang_timeout_s=60, start_timeout_s=60)


def supervise(function: str, folder: Path, stop: StopRequest, ranks: int = 1, limits: Limits = LIMITS) -> Verdict:
    environments = [{"RANK": str(rank)} for rank in range(ranks)]
    return Supervisor(stop, limits).run(f"stage_for_tests:{function}", folder, environments)


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


def test_a_killed_supervisor_takes_its_processes_with_it(folder: Path) -> None:
    program = (
        "from pathlib import Path; from job.launch import Limits, StopRequest, Supervisor\n"
        f"Supervisor(StopRequest(), Limits(5, 60, 60)).run('stage_for_tests:one_refuses', Path({str(folder)!r}))"
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
    def ask_to_stop() -> None:
        deadline = time.monotonic() + 30
        while not (folder / "child.pid").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask_to_stop)
    thread.start()
    verdict = supervise("with_child", folder, stop)
    thread.join()
    assert verdict.code == 75
    wait_until_gone(int((folder / "child.pid").read_text()))


def test_without_a_gpu_auto_is_one_rank_and_ranks_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_topology(Distributed(), Place()).world_size == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert find_topology(Distributed(), Place()).world_size == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    environments: list[dict[str, Any]] = list(
        find_topology(Distributed(processes_per_node=2), Place()).rank_environments(29500)
    )
    assert [variables["RANK"] for variables in environments] == ["0", "1"]
    assert len({variables["MASTER_PORT"] for variables in environments}) == 1


@pytest.mark.parametrize(
    ("said", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, None), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_that_wait_let_others_have_the_processor_where_the_user_says_nothing_else(
    said: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    (variables,) = find_topology(Distributed(processes_per_node=1), Place()).rank_environments(29500)
    assert variables.get("GOMP_SPINCOUNT") == spins


def test_a_rank_without_a_gpu_keeps_freed_memory_for_its_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most memory of a step is freed at its end: without this each step's pages would be zeroed anew."""
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    (variables,) = Topology(Place(), 1, 0).rank_environments(29500)
    code = (
        "import ctypes, resource, torch\n"
        "ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, of which few are many small ones\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for step in range(20):\n"
        "    if step == 10: before = faults()\n"
        "    kept = [torch.ones(size << 20) for size in (9, 16, 25)]\n"
        "    del kept\n"
        "print(faults() - before)"
    )
    counts = [
        int(subprocess.run([sys.executable, "-c", code], env=os.environ | told, capture_output=True, check=True).stdout)
        for told in ({}, variables)
    ]
    assert counts[0] > 400_000 * 4096 // os.sysconf("SC_PAGE_SIZE"), "10 times 200 MB in pages of 4 KiB"
    assert counts[1] < counts[0] / 5
    (variables,) = Topology(Place(), 1, gpus=1).rank_environments(29500)
    assert "MALLOC_MMAP_MAX_" not in variables


@contextmanager
def once(file: Path, act: Callable[[int], None]) -> Iterator[None]:
    """Act on the process that writes its id into `file`, as soon as it does."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if file.exists() and file.read_text():
                return act(int(file.read_text()))
            time.sleep(0.02)

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2], ids=lambda number: number.name)
@pytest.mark.parametrize("function", ["wait", "wait_politely"])
def test_a_signal_to_one_process_stops_all_of_them_with_75(
    folder: Path, stop: StopRequest, number: signal.Signals, function: str
) -> None:
    def send_when_the_peer_is_ready(pid: int) -> None:
        with once(folder / "ready-0.txt", lambda _: os.kill(pid, number)):
            pass

    with once(folder / "ready-1.txt", send_when_the_peer_is_ready):
        verdict = supervise(function, folder, stop, ranks=2)
    assert verdict.code == 75, verdict
    if function == "wait_politely":
        assert (folder / "saved-0.txt").exists(), "the peer was asked to stop, not killed"


@pytest.mark.parametrize("function", ["end_in_a_storm", "fail_in_a_storm"])
def test_signals_that_come_while_a_process_ends_leave_its_outcome_or_75(
    folder: Path, stop: StopRequest, function: str
) -> None:
    for _ in range(5):
        verdict = supervise(function, folder, stop)
        assert verdict.code in ((0, 75) if function == "end_in_a_storm" else (75,)), verdict


def test_who_does_not_stop_within_the_grace_is_killed_and_what_was_committed_counts(
    folder: Path, stop: StopRequest
) -> None:
    with once(folder / "ready-0.txt", lambda pid: os.kill(os.getpid(), signal.SIGTERM)):
        verdict = supervise("ignore_everything", folder, stop, limits=Limits(1, 60, 60))
    assert verdict.code == 75
    assert "SIGTERM, not finished within 1 s; the last committed checkpoint stays" in verdict.reason
    wait_until_gone(int((folder / "ready-0.txt").read_text()))


def test_one_request_that_comes_on_two_ways_does_not_shorten_the_grace(folder: Path, stop: StopRequest) -> None:
    """Ctrl-C reaches every process of a terminal, and whoever stands above passes it on as well."""

    def pass_on_too(pid: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not stop.count:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    with once(folder / "ready-0.txt", pass_on_too):
        verdict = supervise("wait_politely", folder, stop, limits=Limits(30, 900, 900))
    assert stop.count == 1
    assert verdict.code == 75


@pytest.mark.parametrize("name", ["job.py", "queue.py", "tokenizers.py"])
def test_a_file_where_job_is_called_is_not_taken_for_a_library(
    folder: Path, stop: StopRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / name).write_text("raise SystemExit('taken')")
    monkeypatch.chdir(tmp_path / "project")
    assert supervise("fine", folder, stop).code == 0


def test_a_second_signal_shortens_the_grace(folder: Path, stop: StopRequest) -> None:
    def ask_twice(pid: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    began = time.monotonic()
    with once(folder / "ready-0.txt", ask_twice):
        verdict = supervise("ignore_everything", folder, stop, limits=Limits(600, 900, 900))
    assert verdict.code == 75
    assert time.monotonic() - began < 120, "far below the grace of 600 s"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_process_is_79_and_named(folder: Path, stop: StopRequest, ranks: int) -> None:
    last = ranks - 1
    with once(folder / f"ready-{last}.txt", lambda pid: os.kill(pid, signal.SIGSTOP)):
        verdict = supervise("wait", folder, stop, ranks, Limits(5, 3, 60))
    assert verdict.code == 79
    assert verdict.reason.startswith(f"process {last} of {ranks} has shown no sign of life for")
    assert "is stopped" in verdict.reason
    for rank in range(ranks):
        wait_until_gone(int((folder / f"ready-{rank}.txt").read_text()))


def test_a_process_that_does_not_end_when_it_is_killed_is_79_and_keeps_nobody(
    folder: Path, stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.launch.supervisor._DYING_S", 1.0)
    began = time.monotonic()
    verdict = supervise("one_is_debugged", folder, stop, ranks=3)
    took_s, debugger = time.monotonic() - began, int((folder / "debugger-0.txt").read_text() or 0)
    if not debugger:
        pytest.skip("no process may trace another here")
    os.kill(debugger, signal.SIGKILL)
    assert (verdict.code, "process 0 of 3 was killed and does not end" in verdict.reason) == (79, True), verdict
    assert took_s < 30, "the debugger would have let it go after 40 s"
    wait_until_gone(int((folder / "ready-2.txt").read_text()))


def test_a_process_whose_main_thread_hangs_is_79_once_it_beats_for_itself(folder: Path, stop: StopRequest) -> None:
    verdict = supervise("hang", folder, stop, limits=Limits(5, 2, 60))
    assert verdict.code == 79
    assert "no sign of life" in verdict.reason


def test_a_long_stage_that_is_alive_is_left_alone(folder: Path, stop: StopRequest) -> None:
    assert supervise("work_long", folder, stop, limits=Limits(5, 4, 60)).code == 0


def test_what_the_check_raises_ends_the_group_and_reaches_the_caller(folder: Path, stop: StopRequest) -> None:
    def check() -> None:
        if (folder / "ready-0.txt").exists():
            raise Fenced("a newer attempt owns this run")

    with pytest.raises(Fenced):
        Supervisor(stop, LIMITS, check).run("stage_for_tests:wait", folder)
    wait_until_gone(int((folder / "ready-0.txt").read_text()))


def test_the_time_limit_stops_early_enough_to_save(folder: Path) -> None:
    """A limit of 12 s with a checkpoint that takes 3 s leaves 6 s for saving."""
    (folder / "reserve.json").write_text('{"seconds": 3}')
    stop, began = StopRequest(time_limit_min=0.2), time.monotonic()
    try:
        verdict = supervise("wait_politely", folder, stop)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert verdict.code == 75
    assert stop.name == "launch.time_limit_min"
    assert time.monotonic() - began > 5


@pytest.mark.parametrize("version", ["v2", "v2 in a container", "v1"])
def test_an_oom_kill_is_read_from_the_cgroup(tmp_path: Path, version: str) -> None:
    own, cgroups = tmp_path / "cgroup", tmp_path / "fs"
    path = {"v2": cgroups / "jobs/one", "v2 in a container": cgroups, "v1": cgroups / "memory/jobs/one"}[version]
    path.mkdir(parents=True)
    own.write_text("4:memory:/jobs/one\n0::/\n" if version == "v1" else "0::/jobs/one\n")
    counter = path / ("memory.oom_control" if version == "v1" else "memory.events")
    (path / ("memory.limit_in_bytes" if version == "v1" else "memory.max")).write_text(f"{512 << 20}\n")
    counter.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    watch = MemoryWatch(cgroups, own)
    assert watch.explain_kill() is None, "kills from before do not count"
    counter.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    shortage = watch.explain_kill()
    assert shortage is not None
    assert shortage.exit_code == 78
    assert "512 MiB" in str(shortage)


def test_a_log_that_nobody_reads_does_not_stop_the_work(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from job.launch import Limits, StopRequest, Supervisor\n"
        f"v = Supervisor(StopRequest(), Limits(5, 20, 60)).run('stage_for_tests:speak', Path({str(folder)!r}))\n"
        "sys.exit(v.code)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    assert process.wait(timeout=120) == 0


def test_the_time_limit_itself_does_not_cut_short_what_it_began(folder: Path) -> None:
    """A limit of 6 s of which 3 s are kept for saving, which takes 5 s."""
    stop = StopRequest(time_limit_min=0.1)
    try:
        verdict = supervise("upload_when_told", folder, stop, limits=Limits(30, 60, 60))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert (verdict.code, stop.count) == (75, 1)
    assert (folder / "uploaded-0.txt").exists(), "nobody was told a second time"


def test_who_agreed_to_stop_is_not_told_again_while_it_uploads(folder: Path, stop: StopRequest) -> None:
    verdict = supervise("agree_then_upload", folder, stop, ranks=2)
    assert (verdict.code, verdict.reason) == (75, "stopped with a checkpoint")
    assert (folder / "uploaded-0.txt").exists()


def test_a_written_outcome_is_not_kept_waiting_by_a_thread(folder: Path, stop: StopRequest) -> None:
    verdict = supervise("refuse_beside_a_thread", folder, stop, limits=Limits(5, 3, 60))
    assert (verdict.code, verdict.reason) == (15, "the gate said no")


def test_a_process_that_never_gets_to_its_first_step_is_79(
    folder: Path, stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_START_TIMEOUT_S", "2")
    verdict = supervise("wait", folder, stop, limits=Limits(5, 2, 60))
    assert verdict.code == 79
    assert "no sign of life" in verdict.reason


def test_a_process_whose_supervisor_was_gone_before_it_began_does_not_work(folder: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    command = [sys.executable, "-m", "job.launch.worker", "stage_for_tests:fine", str(folder), str(folder / "o.json")]
    done = subprocess.run(command, env=os.environ | {"JOB_SUPERVISOR_PID": str(gone.pid)}, timeout=60)
    assert done.returncode == 1
    assert not (folder / "o.json").exists()


@pytest.fixture
def ahead(folder: Path, stop: StopRequest) -> Iterator[tuple[Supervisor, int]]:
    """A supervisor, and the id of a process that it has started ahead and that has imported its module."""
    supervisor, note = Supervisor(stop, LIMITS), folder / "imported"
    for path, text in (("outcomes/say_who-0.json", "{}"), ("logs/say_who-0.log", "of the attempt before")):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)
    supervisor.start_ahead("stage_for_tests:say_who", folder, [{"IMPORTED": str(note)}])
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    yield supervisor, int(note.read_text())
    supervisor.drop_ahead()


def test_a_process_that_was_started_ahead_waits_for_what_it_is_to_do_and_then_does_it(
    folder: Path, ahead: tuple[Supervisor, int]
) -> None:
    supervisor, pid = ahead
    outcome, log = folder / "outcomes" / "say_who-0.json", folder / "logs" / "say_who-0.log"
    time.sleep(0.5)
    assert (outcome.read_text(), log.read_text()) == ("{}", "of the attempt before"), "it has not begun"
    verdict = supervisor.run("stage_for_tests:say_who", folder, [{"RANK": "0", "COLOR": "red"}])
    assert verdict.record == {"pid": pid, "color": "red"}
    assert log.read_text() == ""
    assert supervisor.run("stage_for_tests:say_who", folder, [{"RANK": "0"}]).record["pid"] != pid, "only once"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_where_a_process_that_was_started_ahead_has_died_another_takes_its_place(
    folder: Path, ahead: tuple[Supervisor, int], number: int
) -> None:
    supervisor, pid = ahead
    os.kill(pid, number)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it is left to the supervisor to reap
    verdict = supervisor.run("stage_for_tests:say_who", folder, [{"RANK": "0"}])
    assert verdict.code == 0
    assert verdict.record["pid"] != pid


def test_what_was_started_ahead_for_nothing_is_gone_when_it_is_dropped(ahead: tuple[Supervisor, int]) -> None:
    supervisor, pid = ahead
    supervisor.drop_ahead()
    wait_until_gone(pid)


@pytest.mark.parametrize("left", ["", "5", "null", "[1]", "[" * 100_000, '{"seconds": null}'])
def test_a_file_that_says_no_longer_how_long_saving_takes_says_nothing(tmp_path: Path, left: str) -> None:
    (tmp_path / "reserve.json").write_text(left)
    assert _read_saving_s(tmp_path) == 0.0
