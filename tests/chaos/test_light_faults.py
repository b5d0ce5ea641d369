"""Faults that hit a whole run (numbers as in the failure catalogue): its exit code, its reason, its store."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cases import (
    Case,
    check_finished,
    check_store,
    descendants,
    end,
    resumed_from,
    send,
    suspend,
    wait_for,
    wait_for_commit,
)

from job.store.commit import read_pointer
from job.store.records import dump

SLOW = {"LIGHT_STEP_S": "0.5"}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(str(tmp_path / "store"), tmp_path)


def read_all(case: Case) -> dict[str, object]:
    """Return everything that the run's prefix holds, without what attempts note about themselves."""
    keys = [item.key for item in case.run.objects.list("") if not item.key.startswith("attempts/1")]
    return {key: case.run.objects.read(key) for key in keys}


@pytest.mark.parametrize(("ranks", "seed"), [pytest.param(1, 1, marks=pytest.mark.slow), (2, 2)])
def test_6_killed_again_and_again_it_ends_with_the_same_state(tmp_path: Path, ranks: int, seed: int) -> None:
    case, rng = Case(str(tmp_path / "store"), tmp_path, ranks), random.Random(seed)
    for number in range(4):
        before = check_store(case)
        process = case.start(f"work-{number}", "--ttl=1", LIGHT_STEP_S="0.1")
        time.sleep(rng.uniform(0.5, 3))
        send(descendants(process.pid), signal.SIGKILL)
        process.communicate(timeout=60)
        assert check_store(case) >= before
    check_finished(case, case.attempt("last", "--ttl=1"))


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("rank", 79),
        pytest.param("stop", 79, marks=pytest.mark.slow),
        ("term", 75),
        pytest.param("usr1", 75, marks=pytest.mark.slow),
        pytest.param("usr2", 75, marks=pytest.mark.slow),
    ],
)
def test_7_9_1_5_what_happens_to_one_rank_ends_all_with_its_code(tmp_path: Path, what: str, code: int) -> None:
    case = Case(str(tmp_path / "store"), tmp_path, ranks=2)
    process = case.start("first", "--hang-timeout=3", **SLOW)
    wait_for_commit(case)
    number = {"rank": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}.get(what) or signal.Signals[
        f"SIG{what.upper()}"
    ]
    os.kill(random.Random(code).choice(descendants(process.pid)[1:3]), number)
    below = descendants(process.pid)
    ended = end(process)
    assert (ended.code, ended.result["exit_code"]) == (code, code), ended
    assert "\n" not in str(ended.result["reason"])
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()], "no process is left"
    check_finished(case, case.attempt("second"))
    assert (resumed_from(case) or 0) > 0


def test_1_a_signal_to_the_slower_of_two_ranks_commits_the_step_of_the_stop(tmp_path: Path) -> None:
    """The other one leaves first; rank 0 is in the upload by then."""
    case = Case(str(tmp_path / "store"), tmp_path, ranks=2)
    slow = {"JOB_FAILPOINT": "files-uploaded=sleep:3", "JOB_FAILPOINT_RANK": "0"}
    process = case.start("first", "--save-steps=100", LIGHT_STEP_S="0.5", **slow)
    votes = case.place / "first/runs/run-1/train/votes-1/rank-00000"
    wait_for(lambda: votes.exists() and votes.stat().st_size >= 2)
    first = next(pid for pid in descendants(process.pid) if b"\0RANK=0\0" in read_environment(pid))
    os.kill(first, signal.SIGTERM)
    assert end(process).code == 75
    assert check_store(case) >= 2
    check_finished(case, case.attempt("second"))


def read_environment(pid: int) -> bytes:
    """Return what a process was started with; nothing of one that ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def test_8_a_supervisor_killed_while_a_rank_starts_leaves_no_orphan(case: Case) -> None:
    process = case.start("first", "--ttl=1", LIGHT_STEP_S="0.5")
    wait_for(lambda: any(b"\0RANK=0\0" in read_environment(pid) for pid in descendants(process.pid)[1:]))
    below = descendants(process.pid)[1:]
    send([process.pid], signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
    check_finished(case, case.attempt("second", "--ttl=1"))


def test_8_a_killed_supervisor_takes_its_ranks_with_it_and_the_next_goes_on(tmp_path: Path) -> None:
    case = Case(str(tmp_path / "store"), tmp_path, ranks=2)
    process = case.start("first", "--ttl=60", **SLOW)
    wait_for_commit(case)
    below = descendants(process.pid)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not [pid for pid in below if Path(f"/proc/{pid}").exists()])
    check_finished(case, case.attempt("second", "--ttl=60"))


@pytest.mark.slow
def test_2_a_second_signal_leaves_soon_with_what_was_committed(case: Case) -> None:
    process = case.start("first", **SLOW)
    wait_for_commit(case)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert end(process).code == 75
    check_finished(case, case.attempt("second"))


def is_removed(group: Path) -> bool:
    """Remove a cgroup; not yet while a process that has ended is still leaving it, which nothing lists any more."""
    with suppress(OSError):
        group.rmdir()
    return not group.exists()


@contextmanager
def memory_limit(mib: int) -> Iterator[list[str]]:
    """Make a cgroup (v1 or v2) with so much memory; yields the words that run a command in it."""
    root = Path("/sys/fs/cgroup/memory")
    root, limit = (root, "memory.limit_in_bytes") if root.is_dir() else (root.parent, "memory.max")
    group = root / f"job-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(mib << 20))
        for name, value in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", mib << 20)):
            if (group / name).exists():  # else what is too much would be swapped
                (group / name).write_text(str(value))
    except OSError as error:
        pytest.skip(f"no cgroup with a limit can be made here (root, a writable hierarchy): {error}")
    try:
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        wait_for(lambda: is_removed(group))


def test_11_what_the_kernel_kills_for_lack_of_memory_is_78_and_names_the_limit(case: Case) -> None:
    hungry = os.environ | {"LIGHT_HUNGER_MIB": "600", "LIGHT_STEP_S": "0.1"}
    with memory_limit(400) as inside:
        command, pipe = [*inside, *case.command("first", "--ttl=1")], subprocess.PIPE
        ended = end(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=hungry))
    assert ended.code == 78, ended.stderr
    assert "the kernel killed a process for lack of memory (cgroup limit: 400 MiB" in ended.result["reason"]
    committed = check_store(case)
    check_finished(case, case.attempt("second", "--ttl=1"))
    assert (resumed_from(case) or 0) >= committed >= 2


def test_36_a_second_job_with_the_same_run_id_leaves_with_76_and_does_not_disturb(case: Case) -> None:
    first = case.start("first", "--ttl=3", LIGHT_STEP_S="3")
    wait_for_commit(case)
    second = case.attempt("second", "--ttl=3")
    assert second.code == 76
    assert "is alive and owns this run" in second.result["reason"]
    ended = end(first)
    assert ended.code == 0
    check_store(case)
    assert str(ended.result["release"])


@pytest.mark.slow
def test_36_a_second_job_in_the_same_work_folder_changes_nothing_for_the_first(case: Case) -> None:
    first = case.start("work", "--ttl=1", JOB_FAILPOINT="ledger-begun=sleep:5")
    wait_for(lambda: case.run.objects.read("attempts/1.json"))
    second = case.attempt("work", "--ttl=1", "--steps=20")
    assert second.code in (16, 76), second.stderr
    check_finished(case, end(first))


def test_37_a_job_that_was_suspended_goes_on_where_nobody_took_it_over(case: Case) -> None:
    process = case.start("first", "--ttl=1", "--hang-timeout=3", LIGHT_STEP_S="0.5")
    wait_for_commit(case)
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    check_finished(case, end(process))


def test_42_a_lease_or_pointer_that_is_damaged_meanwhile_fences_nobody(case: Case) -> None:
    process = case.start("first", "--ttl=1", LIGHT_STEP_S="0.4")
    wait_for_commit(case)
    case.run.objects.write("owner.json", b"")
    pointer = case.run.objects.read("current.json")
    assert pointer is not None
    case.run.objects.write("current.json", pointer.data.replace(b'"epoch": 1', b'"epoch": 7'))
    check_finished(case, end(process))


def test_37_a_zombie_that_wakes_up_after_a_take_over_leaves_with_76(case: Case) -> None:
    zombie = case.start("zombie", "--ttl=1", **SLOW)
    wait_for_commit(case)
    asleep = descendants(zombie.pid)
    suspend(case, asleep)
    check_finished(case, case.attempt("second", "--ttl=1"))
    after = read_all(case)
    send(asleep, signal.SIGCONT)
    ended = end(zombie)
    assert (ended.code, ended.result["exit_code"]) == (76, 76), ended
    left = read_all(case)
    assert {key: left[key] for key in after} == after, "the zombie changed nothing"


@pytest.mark.slow
def test_38_an_owner_that_died_on_another_host_is_replaced_after_the_ttl(case: Case) -> None:
    process = case.start("first", **SLOW)
    wait_for_commit(case)
    send(descendants(process.pid), signal.SIGKILL)
    process.communicate(timeout=60)
    owner = case.run.read_json("owner.json") or {}
    case.run.write_json("owner.json", owner | {"host": "another-host"})
    began = time.monotonic()
    check_finished(case, case.attempt("second", "--ttl=2"))
    assert time.monotonic() - began > 2


def test_41_a_run_that_dies_at_the_same_step_stops_with_18_after_three_attempts(case: Case) -> None:
    for number in range(3):
        assert case.attempt(f"work-{number}", "--ttl=1", JOB_FAILPOINT="checkpoint-write=raise").code == 1
    refused = case.attempt("fourth", "--ttl=1")
    assert refused.code == 18
    assert "3 attempts in a row committed nothing new" in refused.result["reason"]
    check_finished(case, case.attempt("fifth", "--ttl=1"))


def commit_some(case: Case) -> None:
    assert case.attempt("zeroth", "--ttl=1", JOB_FAILPOINT="pointer=kill@4").code == 79


@pytest.mark.slow
def test_42_a_damaged_pointer_is_replaced_by_the_newest_whole_checkpoint(case: Case) -> None:
    commit_some(case)
    case.run.objects.write("current.json", b"")
    check_finished(case, case.attempt("second", "--ttl=1"))
    assert (resumed_from(case) or 0) >= 6


@pytest.mark.slow
def test_25_43_a_damaged_or_missing_object_sends_the_run_one_checkpoint_back(case: Case) -> None:
    commit_some(case)
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), lambda path: path.unlink()):
        pointer = read_pointer(case.run.objects)
        assert pointer is not None
        folder = Path(case.store) / "runs" / case.run_id / Path(pointer["manifest"]).parent
        damage(folder / "model.safetensors")
        ended = case.attempt("again", "--ttl=1", JOB_FAILPOINT="pointer=kill@2")
        assert "the next older checkpoint is tried" in ended.stderr
    check_finished(case, case.attempt("last", "--ttl=1"))
    assert (resumed_from(case) or 0) > 0


def test_44_with_nothing_whole_it_is_17_until_somebody_says_fresh(case: Case) -> None:
    commit_some(case)
    for path in (Path(case.store) / "runs" / case.run_id / "checkpoints").rglob("model.safetensors"):
        path.write_bytes(b"rubbish")
    refused = case.attempt("second", "--ttl=1")
    assert refused.code == 17
    assert "--fresh" in refused.result["reason"]
    check_finished(case, case.attempt("third", "--ttl=1", "--fresh"))
    assert resumed_from(case) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage-run=kill@2", "release-files=kill", "release-manifest-written=kill"])
def test_66_67_what_was_trained_is_not_trained_again(case: Case, name: str) -> None:
    assert case.attempt("first", "--ttl=1", JOB_FAILPOINT=name).code == -9
    trained = case.run.read_json("stages/train.json")
    assert trained is not None
    check_finished(case, case.attempt("second", "--ttl=1"))
    assert case.run.read_json("stages/train.json") == trained


@pytest.mark.slow
def test_16_another_recipe_under_the_same_run_id_is_refused_and_changes_nothing(case: Case) -> None:
    commit_some(case)
    before = read_all(case)
    refused = case.attempt("second", "--ttl=1", "--steps=99")
    assert refused.code == 16
    assert "training.max_steps: 12 → 99" in refused.result["reason"]
    assert read_all(case) == before
    check_finished(case, case.attempt("third", "--ttl=1", "--save-steps=5"))
    assert (resumed_from(case) or 0) > 0, "how often is saved does not matter"


@pytest.mark.slow
def test_29_a_bucket_that_is_not_there_is_13(tmp_path: Path, s3: str) -> None:
    ended = Case(f"{s3}-not-there", tmp_path).attempt("work")
    assert ended.code == 13
    assert "does not exist" in ended.result["reason"]


@pytest.mark.slow
def test_26_credentials_that_may_not_read_are_12_and_never_an_empty_store(tmp_path: Path, s3: str) -> None:
    case = Case(f"{s3}/{tmp_path.name}", tmp_path)
    commit_some(case)
    ended = case.attempt("second", AWS_SECRET_ACCESS_KEY="wrong")
    assert ended.code == 12
    check_finished(case, case.attempt("third", "--ttl=1"))
    assert (resumed_from(case) or 0) > 0


@pytest.mark.slow
def test_28_a_clock_that_is_an_hour_off_changes_nothing_in_a_folder(case: Case) -> None:
    """Times are for people: a lease from the future or the past is judged by the observer's own waiting."""
    commit_some(case)
    owner = case.run.read_json("owner.json") or {}
    case.run.objects.write("owner.json", dump(owner | {"began": "2999-01-01T00:00:00"}))
    for path in Path(case.store).rglob("*"):
        os.utime(path, (4e9, 4e9), follow_symlinks=False)
    check_finished(case, case.attempt("second", "--ttl=1"))
