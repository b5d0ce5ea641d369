"""An attempt: what it owns it may write, what it tried is remembered, and three fruitless ones are enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.errors import Fenced, NoProgress
from job.store import Attempt, RunStore
from job.store.attempt import read_stage
from job.store.checkpoints import CheckpointWriter
from job.store.commit import write_pointer
from job.store.inventory import follow_events
from job.store.lease import Lease
from job.store.ledger import WAITED_IN_VAIN
from job.store.records import Record
from job.store.restore import list_manifests

STAGES = ["train", "release"]


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "store"), "run-1")


def attempt_once(run: RunStore, code: int | None, work: str = "w", stage: Record | None = None) -> int:
    """Begin an attempt, commit `stage` if any, and end with `code`; None is a death without a word."""
    attempt = Attempt(run, 1, lambda: None)
    try:
        attempt.begin(work, STAGES)
        if stage:
            attempt.commit_record("train", stage)
    except NoProgress as error:
        attempt.leave({"exit_code": error.exit_code, "reason": str(error)})
        return error.exit_code
    if code is None:
        die(attempt)
    else:
        attempt.leave({"exit_code": code, "reason": "for the test"})
    return code or 0


def die(attempt: Attempt) -> None:
    """Stop without ending the ledger; the lease is given back, so that the test need not wait for the TTL."""
    lease: Lease = attempt._lease
    lease.release()


@pytest.mark.parametrize("code", [1, 78, 79, 14, None], ids=str)
def test_after_three_fruitless_attempts_the_fourth_refuses_and_the_next_start_has_three_more(
    run: RunStore, code: int | None
) -> None:
    for _ in range(2):
        for _ in range(3):
            assert attempt_once(run, code) in (code, 0)
        assert attempt_once(run, 0) == 18
    record = run.read_json("attempts/4.json")
    assert record is not None
    assert record["exit_code"] == 18
    assert "3 attempts in a row committed nothing new" in record["reason"]


def test_a_death_without_a_word_is_named_in_the_refusal(run: RunStore) -> None:
    for code in (None, 1, None):
        attempt_once(run, code)
    assert attempt_once(run, 1) == 18
    record = run.read_json("attempts/4.json")
    assert record is not None
    assert "attempt 1: killed without a word (memory is the usual cause)" in record["reason"]
    assert "attempt 2: 1, for the test" in record["reason"]


@pytest.mark.parametrize("code", [75, 76, 77])
def test_an_interrupted_fenced_or_cut_off_attempt_is_not_counted(run: RunStore, code: int) -> None:
    for _ in range(8):
        assert attempt_once(run, code) == code


def test_a_cluster_that_is_full_for_long_does_not_use_up_the_attempts(run: RunStore) -> None:
    for _ in range(4):
        attempt = Attempt(run, 1, lambda: None)
        attempt.begin("w", STAGES)
        attempt.note(WAITED_IN_VAIN)
        attempt.leave({"status": "failed", "exit_code": 79, "reason": "node(s) 1 did not join"})
    assert attempt_once(run, 0) == 0


def test_interruptions_between_crashes_do_not_hide_that_nothing_goes_forward(run: RunStore) -> None:
    for code in (1, 75, 1, 76, 77, 1):
        assert attempt_once(run, code) == code
    assert attempt_once(run, 1) == 18


def test_a_new_record_or_another_recipe_starts_the_count_again(run: RunStore) -> None:
    for number in range(6):
        assert attempt_once(run, 1, stage={"key": "k", "outputs": str(number)}) == 1
    for number in range(6):
        assert attempt_once(run, 1, work=f"recipe {number // 2}") == 1


def test_the_same_record_again_is_no_progress(run: RunStore) -> None:
    attempt_once(run, 1, stage={"key": "k", "outputs": "o"})
    for _ in range(3):
        assert attempt_once(run, 1, stage={"key": "k", "outputs": "o"}) == 1
    assert attempt_once(run, 1) == 18


def test_a_damaged_ledger_does_not_stop_a_run(run: RunStore) -> None:
    attempt_once(run, 1)
    run.objects.write("attempts/1.json", b"{")
    assert attempt_once(run, 0) == 0


def test_who_lost_the_run_commits_no_record_and_leaves_no_result(run: RunStore) -> None:
    first = Attempt(run, 60, lambda: None)
    first.begin("w", STAGES)
    owner = run.read_json("owner.json")
    assert owner is not None
    run.write_json("owner.json", owner | {"released": True})
    second = Attempt(run, 60, lambda: None)
    second.begin("w", STAGES)
    second.commit_record("train", {"key": "k", "outputs": "second"})
    with pytest.raises(Fenced):
        first.commit_record("train", {"key": "k", "outputs": "first"})
    first.leave({"exit_code": 76, "reason": "fenced"})
    found = read_stage(run.objects, "train")
    assert found is not None
    assert found["outputs"] == "second"
    assert run.objects.read("result.json") is None
    second.verify()
    second.leave({"exit_code": 0, "reason": ""})


def test_a_record_with_a_flipped_bit_counts_as_none(run: RunStore) -> None:
    attempt_once(run, 0, stage={"key": "k", "outputs": "o", "record": {"accuracy": 0.81}})
    blob = run.objects.read("stages/train.json")
    assert blob is not None
    for at in range(len(blob.data)):
        damaged = bytearray(blob.data)
        damaged[at] ^= 4
        run.objects.write("stages/train.json", bytes(damaged))
        found = read_stage(run.objects, "train")
        assert found is None or found["record"] == {"accuracy": 0.81}


def test_fresh_forgets_records_and_manifests_and_says_so_in_the_pointer(run: RunStore) -> None:
    attempt_once(run, 1, stage={"key": "k", "outputs": "o"})
    run.objects.write("checkpoints/e0001-s00000010-01234567/manifest.json", b"{}")
    attempt = Attempt(run, 1, lambda: None)
    attempt.start_over(STAGES)
    assert read_stage(run.objects, "train") is None
    assert not list(run.objects.list("checkpoints/"))
    pointer = run.read_json("current.json")
    assert pointer is not None
    assert (pointer["since"], pointer["manifest"]) == (attempt.epoch, None)
    attempt.leave({"exit_code": 0, "reason": ""})


def test_a_fresh_start_that_was_killed_right_after_it_gave_up_the_past_is_not_taken_for_finished(
    run: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt_once(run, 0, stage={"key": "k", "outputs": "o"})
    killed = Attempt(run, 60, lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(killed, "verify", raise_killed)
        with pytest.raises(Killed):
            killed.start_over(STAGES)
    die(killed)
    assert run.objects.read("stages/train.json"), "it lies there still"
    assert read_stage(run.objects, "train") is None
    again = Attempt(run, 60, lambda: None)
    assert again.restore(tmp_path / "resume", 1 << 20) is None
    again.commit_record("train", {"key": "k", "outputs": "new"})
    assert (read_stage(run.objects, "train") or {})["outputs"] == "new"
    die(again)


class Killed(BaseException):
    """The process is gone."""


def raise_killed() -> None:
    raise Killed


def test_an_attempt_that_was_retried_at_once_is_not_counted(run: RunStore) -> None:
    for _ in range(4):
        attempt = Attempt(run, 1, lambda: None)
        attempt.begin("w", STAGES)
        attempt.leave({"exit_code": 78, "reason": "memory", "status": "retried"})
    assert attempt_once(run, 78) == 78
    record = run.read_json("attempts/4.json")
    assert record is not None
    assert record["retried"] is True


def test_who_follows_a_run_sees_each_event_once_and_its_end_whatever_came_between(run: RunStore) -> None:
    attempt_once(run, 79)
    run.write_json("run.json", {})
    rows = follow_events(run.uri, pause_s=0.01)
    seen = [next(rows) for _ in range(2)]
    assert [row[2] for row in seen] == ["attempt began", "attempt ended"]
    attempt_once(run, 0, stage={"outputs": "x"})
    rest = list(rows)
    assert [row[2] for row in rest] == [
        "attempt began",
        "stage committed",
        "attempt ended",
        "run ended with exit code 0",
    ]
    assert {row[1] for row in rest} == {"2"}


@pytest.mark.parametrize("code", [[0], {}, None, True, "0", 0.0])
def test_who_follows_a_run_waits_on_where_its_last_code_is_no_number(run: RunStore, code: object) -> None:
    run.write_json("run.json", {})
    run.write_json("attempts/1.json", {"exit_code": code, "began": "t0", "ended": "t1"})
    rows = follow_events(run.uri, pause_s=0.0)
    seen = [next(rows)[2] for _ in range(2)]
    run.write_json("attempts/2.json", {"exit_code": 0, "began": "t2", "ended": "t3"})
    assert [*seen, *(row[2] for row in rows)] == [
        "attempt began", "attempt ended", "attempt began", "attempt ended", "run ended with exit code 0",
    ]  # fmt: skip


def test_an_attempt_whose_name_is_no_number_is_not_listed(run: RunStore) -> None:
    attempt_once(run, 0)
    run.write_json("run.json", {})
    run.objects.write("attempts/².json", b"{}")
    assert [row[2] for row in follow_events(run.uri, pause_s=0.0)][-1] == "run ended with exit code 0"


def test_a_fresh_start_that_was_stopped_in_between_deletes_nothing_of_its_successor(
    run: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zombie = Attempt(run, 60, lambda: None)
    successor: list[Attempt] = []

    def move_then_sleep(*words: object) -> str:
        etag = write_pointer(*words)  # type: ignore[arg-type]
        monkeypatch.undo()
        die(zombie)
        successor.append(Attempt(run, 60, lambda: None))
        commit_once(run, successor[0], tmp_path)
        successor[0].commit_record("train", {"outputs": "x"})
        return etag

    monkeypatch.setattr("job.store.attempt.write_pointer", move_then_sleep)
    with pytest.raises(Fenced):
        zombie.start_over(STAGES)
    with pytest.raises(Fenced):
        zombie.claim({"run_id": "of the zombie"})
    assert read_stage(run.objects, "train")
    assert len(list_manifests(run.objects)) == 1
    assert run.read_json("run.json") is None
    die(successor[0])


def test_a_fresh_start_forgets_what_was_committed_before(run: RunStore, tmp_path: Path) -> None:
    first = Attempt(run, 60, lambda: None)
    commit_once(run, first, tmp_path)
    first.commit_record("train", {"outputs": "x"})
    first.claim({"run_id": "one"})
    die(first)
    second = Attempt(run, 60, lambda: None)
    second.start_over(STAGES)
    second.claim({"run_id": "another"})
    assert (read_stage(run.objects, "train"), list_manifests(run.objects)) == (None, [])
    assert run.read_json("run.json") == {"run_id": "another"}
    assert second.restore(tmp_path / "resume", 1 << 20) is None
    die(second)


def commit_once(run: RunStore, attempt: Attempt, place: Path) -> None:
    (place / "checkpoint").mkdir(exist_ok=True)
    (place / "checkpoint/model.safetensors").write_bytes(b"weights")
    about = {"epoch": attempt.epoch, "nonce": attempt.nonce, "keep": 2, "peer_timeout_s": 5, "since": attempt.since}
    CheckpointWriter(run, 0, 1, about).commit(place / "checkpoint", 4, {"world_size": 1})
