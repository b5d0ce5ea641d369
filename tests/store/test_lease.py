"""The lease: one owner at a time, quick take-over from the dead, no trust in any clock but one's own monotonic one."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from job.errors import Fenced, Interrupted
from job.store import RunStore, Store
from job.store.commit import fence
from job.store.lease import OWNER, Holder, Lease, acquire_lease, verify_owner
from job.store.records import dump

DEAD = {"epoch": 7, "nonce": "of the dead", "seq": 3, "released": False}


@pytest.fixture
def objects(store_uri: str) -> Store:
    return RunStore(store_uri, "run-1").objects


@pytest.fixture
def leases() -> Iterator[list[Lease]]:
    """Leases that are released when the test ends."""
    taken: list[Lease] = []
    yield taken
    for lease in taken:
        lease.release()


def acquire(objects: Store, ttl_s: float = 30) -> Lease:
    return acquire_lease(objects, ttl_s, lambda: None)


def read_owner(objects: Store) -> dict[str, Any]:
    blob = objects.read(OWNER)
    assert blob is not None
    return dict(json.loads(blob.data))


def test_the_first_attempt_is_epoch_1_and_a_released_lease_is_taken_at_once(
    objects: Store, leases: list[Lease]
) -> None:
    first = acquire(objects)
    assert first.epoch == 1
    first.release()
    assert read_owner(objects)["released"] is True
    began = time.monotonic()
    leases.append(acquire(objects))
    assert leases[0].epoch == 2
    assert time.monotonic() - began < 10, "far below the TTL of 30 s"


def test_an_epoch_is_above_that_of_a_fence_even_when_owner_json_is_gone(objects: Store, leases: list[Lease]) -> None:
    objects.write("current.json", dump({"epoch": 41}))
    leases.append(acquire(objects))
    assert leases[0].epoch == 42


def test_a_living_owner_is_waited_for_twice_the_ttl_and_not_disturbed(objects: Store, leases: list[Lease]) -> None:
    leases.append(acquire(objects, ttl_s=2))
    began = time.monotonic()
    with pytest.raises(Fenced, match="is alive and owns this run") as caught:
        acquire(objects, ttl_s=2)
    assert caught.value.exit_code == 76
    assert time.monotonic() - began >= 4
    leases[0].verify()
    leases[0].check()


def test_a_living_owner_with_a_longer_ttl_is_not_replaced_by_who_starts_with_a_shorter_one(
    objects: Store, leases: list[Lease]
) -> None:
    leases.append(acquire(objects, ttl_s=8))  # renewed every two seconds
    with pytest.raises(Fenced, match="is alive and owns this run"):
        acquire(objects, ttl_s=0.5)
    leases[0].verify()


@pytest.mark.parametrize("ttl_s", [1e300, -1, True, "long", None])
def test_a_ttl_in_a_record_that_is_none_makes_nobody_wait_for_it(
    objects: Store, leases: list[Lease], ttl_s: Any
) -> None:
    objects.write(OWNER, dump(DEAD | asdict(replace(Holder.me(), host="elsewhere")) | {"ttl_s": ttl_s}))
    leases.append(acquire(objects, ttl_s=0.5))
    assert leases[0].epoch == 8


def test_who_waits_for_a_living_owner_says_for_whom_and_how_long(
    objects: Store, leases: list[Lease], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("job").propagate = True
    caplog.set_level(logging.INFO, logger="job")
    leases.append(acquire(objects, ttl_s=2))
    with pytest.raises(Fenced):
        acquire(objects, ttl_s=2)
    said = [each.getMessage() for each in caplog.records if each.name == "job.store"]
    owner = f"attempt 1 on {Holder.me().host} (pid {os.getpid()})"
    assert said == [f"{objects.uri}: {owner} owns this run; waiting for it, at most 4 s"]


def test_a_lease_whose_etag_stands_still_for_the_ttl_is_taken_over(objects: Store, leases: list[Lease]) -> None:
    objects.write(OWNER, dump(DEAD | asdict(replace(Holder.me(), host="another-host"))))
    began = time.monotonic()
    leases.append(acquire(objects, ttl_s=1))
    assert time.monotonic() - began >= 1
    assert leases[0].epoch == 8


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"epoch": "7"}', b'{"epoch": 7}', b"null"])
def test_a_damaged_lease_is_taken_over_after_the_ttl(tmp_path: Path, leases: list[Lease], damage: bytes) -> None:
    objects = RunStore(str(tmp_path / "store"), "run-1").objects
    objects.write(OWNER, damage)
    leases.append(acquire(objects, ttl_s=1))
    leases[0].verify()


def finished_process() -> Holder:
    """Return a process of this machine that was there and is gone."""
    script = (
        "import json; from dataclasses import asdict; from job.store.lease import Holder; "
        "print(json.dumps(asdict(Holder.me())))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    return Holder(**json.loads(done.stdout))


def test_a_dead_process_of_the_same_boot_is_replaced_at_once(objects: Store, leases: list[Lease]) -> None:
    objects.write(OWNER, dump(DEAD | asdict(finished_process())))
    began = time.monotonic()
    leases.append(acquire(objects, ttl_s=60))
    assert time.monotonic() - began < 30
    assert leases[0].epoch == 8


def test_a_process_id_that_was_given_again_does_not_count_as_the_old_process() -> None:
    me = Holder.me()
    assert not me.outlives(asdict(me))
    assert me.outlives(asdict(replace(me, started="1")))


@pytest.mark.parametrize(
    "difference",
    [{"host": "x"}, {"boot_id": "x"}, {"pid_namespace": "x"}, {"boot_id": ""}, {"host": 7}, {"pid": "no number"}],
    ids=str,
)
def test_a_process_that_cannot_be_looked_up_is_not_taken_for_dead(difference: dict[str, Any]) -> None:
    me, dead = Holder.me(), asdict(finished_process())
    assert me.outlives(dead)
    assert not me.outlives(dead | difference)


def test_a_requeued_slurm_job_takes_over_from_its_earlier_start_and_never_from_a_later_one() -> None:
    other = asdict(replace(Holder.me(), host="node7", slurm_job="4711@cluster", slurm_restarts=1))
    assert replace(Holder.me(), slurm_job="4711@cluster", slurm_restarts=2).outlives(other)
    for restarts in (0, 1):
        assert not replace(Holder.me(), slurm_job="4711@cluster", slurm_restarts=restarts).outlives(other)
    assert not replace(Holder.me(), slurm_job="4712@cluster", slurm_restarts=2).outlives(other)


def test_a_renewed_lease_is_never_stale_and_its_seq_counts_up(objects: Store, leases: list[Lease]) -> None:
    leases.append(acquire(objects, ttl_s=1))
    before = read_owner(objects)["seq"]
    deadline = time.monotonic() + 20
    while read_owner(objects)["seq"] < before + 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    leases[0].check()


def test_an_owner_that_was_replaced_notices_at_its_next_renewal(objects: Store, leases: list[Lease]) -> None:
    leases.append(acquire(objects, ttl_s=1))
    objects.write(OWNER, dump(DEAD | {"epoch": 99}))
    with pytest.raises(Fenced):
        leases[0].verify()
    deadline = time.monotonic() + 20
    with pytest.raises(Fenced) as caught:
        while time.monotonic() < deadline:
            leases[0].check()
            time.sleep(0.05)
    assert caught.value.exit_code == 76
    leases[0].release()
    assert read_owner(objects)["epoch"] == 99, "the new owner's lease is not touched"


def test_who_waits_can_be_told_to_stop(objects: Store, leases: list[Lease]) -> None:
    leases.append(acquire(objects))

    def refuse() -> None:
        raise Interrupted("SIGTERM")

    with pytest.raises(Interrupted):
        acquire_lease(objects, 30, refuse)


def test_of_eight_attempts_at_once_one_owns_the_run(objects: Store, leases: list[Lease]) -> None:
    ready, fenced = threading.Barrier(8), []

    def attempt() -> None:
        ready.wait()
        try:
            leases.append(acquire(objects, ttl_s=3))
        except Fenced:
            fenced.append(1)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(leases), len(fenced)) == (1, 7)
    verify_owner(objects, leases[0].epoch, leases[0].nonce)


def test_a_killed_owner_on_this_host_is_replaced_without_waiting(tmp_path: Path, leases: list[Lease]) -> None:
    script = (
        "import sys, time; from job.store import RunStore; from job.store.lease import acquire_lease; "
        "acquire_lease(RunStore(sys.argv[1], 'run-1').objects, 300, lambda: None); "
        "print('owns', flush=True); time.sleep(600)"
    )
    store = str(tmp_path / "store")
    process = subprocess.Popen([sys.executable, "-c", script, store], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "owns\n"
    os.kill(process.pid, 9)
    process.communicate()
    leases.append(acquire(RunStore(store, "run-1").objects, ttl_s=300))
    assert leases[0].epoch == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", None], ids=str)
def test_a_lease_that_is_damaged_or_gone_is_written_anew_by_its_owner(
    objects: Store, leases: list[Lease], damage: bytes | None
) -> None:
    leases.append(acquire(objects, 0.8))
    objects.delete([OWNER]) if damage is None else objects.write(OWNER, damage)
    leases[0].verify()
    deadline = time.monotonic() + 30
    while (blob := objects.read(OWNER)) is None or blob.data == damage:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert read_owner(objects)["nonce"] == leases[0].nonce
    leases[0].check()


def test_a_zombie_does_not_gain_by_a_damaged_lease_of_its_successor(objects: Store, leases: list[Lease]) -> None:
    zombie = acquire(objects, 60)
    fence(objects, zombie.epoch, zombie.nonce)
    objects.write(OWNER, dump(read_owner(objects) | {"released": True}))
    leases.append(acquire(objects, 60))
    fence(objects, leases[0].epoch, leases[0].nonce)
    objects.write(OWNER, b"{")
    with pytest.raises(Fenced):
        zombie.verify()
    zombie._renew()
    with pytest.raises(Fenced):
        zombie.check()
    leases[0].verify()
    leases[0]._renew()
    assert read_owner(objects)["nonce"] == leases[0].nonce
