"""Whole runs whose way to a real S3 server is bad (numbers as in the failure catalogue).

What ends well, what ends with which code, and that the next attempt finishes what was begun.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cases import (
    Case,
    check_finished,
    check_store,
    descendants,
    end,
    resumed_from,
    send,
    wait_for,
    wait_for_commit,
)
from fault_proxy import FaultProxy, Request, bad_network, first, serve_faults

from job.store.commit import read_pointer
from job.store.s3 import S3Store

SHORT = {"LIGHT_DEADLINE_S": "1", "LIGHT_STEP_S": "0.3"}


@pytest.fixture
def case(tmp_path: Path, s3: str) -> Case:
    return Case(f"{s3}/{tmp_path.name}", tmp_path)


@pytest.fixture
def proxy(s3: str) -> Iterator[FaultProxy]:
    """A proxy before the server; the test itself asks the server directly."""
    with serve_faults(urlsplit(os.environ["AWS_ENDPOINT_URL_S3"]).netloc) as proxy:
        yield proxy


def behind(proxy: FaultProxy, **variables: str) -> dict[str, str]:
    return {"AWS_ENDPOINT_URL_S3": proxy.endpoint} | variables


def count_steps(case: Case, work: str) -> int:
    """Return how many steps an attempt's first rank has done."""
    votes = case.place / work / "runs" / case.run_id / "train" / "votes-1" / "rank-00000"
    return votes.stat().st_size if votes.exists() else 0


def wait_for_steps(case: Case, work: str, number: int) -> None:
    wait_for(lambda: count_steps(case, work) >= number)


@pytest.mark.parametrize(
    ("ranks", "seed"), [(1, 1), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(2, 3, marks=pytest.mark.slow)]
)
def test_17_20_22_24_a_run_through_a_bad_network_ends_as_an_undisturbed_one(
    tmp_path: Path, s3: str, proxy: FaultProxy, ranks: int, seed: int
) -> None:
    """20 % SlowDown, 5 % resets, 5 % lost answers, 5 % cut answers: no wrong byte, no false fencing."""
    case = Case(f"{s3}/{tmp_path.name}", tmp_path, ranks)
    proxy.fault = bad_network(seed)
    ended = case.attempt("first", "--ttl=5", **behind(proxy, LIGHT_STEP_S="0.1"))
    assert "owns this run" not in ended.stderr
    check_finished(case, ended)
    assert min(proxy.count[kind] for kind in ("503", "reset", "lost", "cut")) > 0


@pytest.mark.slow
def test_17_20_22_24_killed_in_a_bad_network_it_goes_on_in_a_bad_network(case: Case, proxy: FaultProxy) -> None:
    proxy.fault = bad_network(4)
    for number in range(3):
        process = case.start(f"work-{number}", "--ttl=2", **behind(proxy, LIGHT_STEP_S="0.3"))
        before = check_store(case)
        while check_store(case) <= before and process.poll() is None:
            time.sleep(0.1)
        send(descendants(process.pid), signal.SIGKILL)
        process.communicate(timeout=60)
    check_finished(case, case.attempt("last", "--ttl=2", **behind(proxy)))
    assert (resumed_from(case) or 0) > 0


@pytest.mark.slow
def test_18_training_goes_on_through_an_outage_of_many_lease_times(case: Case, proxy: FaultProxy) -> None:
    """Ten minutes at a deadline of one minute and a lease of 30 s, a hundred times faster."""
    process = case.start("first", "--ttl=1", **behind(proxy, LIGHT_DEADLINE_S="1.5", LIGHT_STEP_S="1"))
    wait_for_commit(case)
    before = count_steps(case, "first")
    proxy.fault = lambda request: "503"
    time.sleep(6)
    during = count_steps(case, "first")
    assert during >= before + 4
    assert process.poll() is None
    proxy.fault = lambda request: ""
    ended = end(process)
    assert proxy.count["503"] > 0
    check_finished(case, ended)


def test_18_a_rank_that_alone_loses_the_store_is_waited_for_longer_than_one_that_hangs(
    tmp_path: Path, s3: str, proxy: FaultProxy
) -> None:
    case = Case(f"{s3}/{tmp_path.name}", tmp_path, ranks=2)
    began: list[float] = []

    def refuse_second_rank(request: Request) -> str:
        if request.method != "PUT" or "-00001.json" not in request.key:
            return ""
        began.append(time.monotonic())
        return "503" if began[-1] < began[0] + 8 else ""

    proxy.fault = refuse_second_rank
    check_finished(case, case.attempt("first", "--hang-timeout=4", **behind(proxy, **SHORT)))
    assert resumed_from(case) is None
    assert proxy.count["503"] > 0


ENDLESS = [
    ("503", 77, "SlowDown|503"),
    ("500", 77, "InternalError|500"),
    ("reset", 77, "closed|reset|aborted"),
    ("hole", 77, "[Tt]imeout"),
    ("expired", 77, "credentials expired"),
    ("403", 12, "check the credentials"),
    ("skew", 12, "clock is -3[56]"),
]
QUICK = "403"
"""This one runs in `make test`; the others take longer and differ in one row of a table."""


@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [pytest.param(*row, marks=() if row[0] == QUICK else pytest.mark.slow, id=row[0]) for row in ENDLESS],
)
def test_18_to_21_26_to_28_a_trouble_without_end_has_its_code_and_loses_no_commit(
    case: Case, proxy: FaultProxy, kind: str, code: int, reason: str
) -> None:
    process = case.start("first", "--ttl=1", **behind(proxy, LIGHT_MAX_UNSYNCED_S="4", **SHORT))
    wait_for_commit(case)
    committed = check_store(case)
    proxy.fault = lambda request: kind
    ended = end(process)
    assert (ended.code, ended.result["exit_code"]) == (code, code), ended
    assert re.search(reason, str(ended.result["reason"])), ended
    assert "\n" not in str(ended.result["reason"])
    assert check_store(case) >= committed
    proxy.fault = lambda request: ""
    check_finished(case, case.attempt("second", "--ttl=1", **behind(proxy)))
    assert (resumed_from(case) or 0) >= committed


def test_31_a_server_that_ignores_conditions_is_refused_before_anything_is_claimed(
    case: Case, proxy: FaultProxy
) -> None:
    proxy.fault = lambda request: "strip"
    ended = case.attempt("first", **behind(proxy))
    assert ended.code == 10
    assert "ignores If-None-Match" in ended.result["reason"]
    assert "store.single_writer: true" in ended.result["reason"]
    assert list(case.run.objects.list("")) == []


@pytest.mark.slow
def test_23_conflicts_at_the_pointer_are_tried_again(case: Case, proxy: FaultProxy) -> None:
    proxy.fault = first(12, "409", "PUT", key="current.json")
    check_finished(case, case.attempt("first", **behind(proxy)))
    assert proxy.count["409"] == 12


@pytest.mark.slow
def test_40_a_store_that_lets_nothing_be_deleted_is_warned_of_once(case: Case, proxy: FaultProxy) -> None:
    def refuse_deletions(request: Request) -> str:
        return "403" if request.method == "DELETE" or request.query.startswith("delete") else ""

    proxy.fault = refuse_deletions
    ended = case.attempt("first", **behind(proxy, LIGHT_STEP_S="0.2"))
    assert ended.code == 0, ended.stderr
    assert ended.stderr.count("AccessDenied; check the credentials") == 1, ended.stderr
    assert proxy.count["403"] > 2


def slow_payload(seconds_per_mib: float) -> Callable[[Request], str]:
    """Slow down whatever carries the payload of a checkpoint."""
    return lambda request: f"slow:{seconds_per_mib}" if request.method == "PUT" and "payload" in request.key else ""


@pytest.mark.slow
def test_35_uploads_slower_than_checkpoints_lose_the_older_never_the_newest(case: Case, proxy: FaultProxy) -> None:
    proxy.fault = slow_payload(1.0)
    process = case.start("first", **behind(proxy, LIGHT_PAYLOAD_MIB="2", LIGHT_STEP_S="0.1"))
    wait_for_steps(case, "first", 12)
    manifests = {request.key for request in proxy.seen if request.key.endswith("/manifest.json")}
    assert len(manifests) <= 1, "the steps did not wait for the uploads"
    proxy.fault = lambda request: ""
    check_finished(case, end(process))
    saved = {request.key for request in proxy.seen if "/checkpoints/" in request.key and "manifest" in request.key}
    assert 2 <= len(saved) < 6, "newest wins"


@pytest.mark.slow
@pytest.mark.parametrize("grace", [30, 2])
def test_3_a_stop_during_an_upload_finishes_it_or_leaves_the_one_before(
    case: Case, proxy: FaultProxy, grace: int
) -> None:
    process = case.start(
        "first", f"--grace={grace}", "--ttl=2", **behind(proxy, LIGHT_PAYLOAD_MIB="2", LIGHT_STEP_S="0.5")
    )
    wait_for_commit(case)
    before = check_store(case)
    proxy.fault = slow_payload(3.0)
    wait_for(lambda: proxy.count["slow:3.0"])
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert end(process).code == 75
    assert time.monotonic() - began < grace + 8
    after = check_store(case)
    assert after > before if grace == 30 else after >= before
    proxy.fault = lambda request: ""
    check_finished(case, case.attempt("second", "--ttl=2", **behind(proxy)))
    assert (resumed_from(case) or 0) >= after


@pytest.mark.slow
@pytest.mark.parametrize(("method", "place", "fault"), [("GET", "checkpoints/", "hole"), ("PUT", "models/", "slow:10")])
def test_1_a_stop_does_not_wait_for_a_checkpoint_that_comes_or_a_release_that_goes(
    case: Case, proxy: FaultProxy, method: str, place: str, fault: str
) -> None:
    variables = behind(proxy, LIGHT_PAYLOAD_MIB="8")
    assert case.attempt("first", "--ttl=2", JOB_FAILPOINT="pointer-moved=kill@2", **variables).code != 0
    proxy.fault = lambda it: fault if it.method == method and place in it.key and "payload" in it.key else ""
    process = case.start("second", "--ttl=2", **variables)
    wait_for(lambda: proxy.count[fault])
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    ended = end(process)
    assert (ended.code, "during a transfer" in ended.result["reason"]) == (75, True), ended.stderr
    assert time.monotonic() - began < 5
    proxy.fault = lambda request: ""
    check_finished(case, case.attempt("third", "--ttl=2", **variables))


@pytest.mark.parametrize("place", ["", "owner.json"], ids=["the first look", "the lease"])
def test_1_a_stop_does_not_wait_for_a_store_that_is_out(case: Case, proxy: FaultProxy, place: str) -> None:
    proxy.fault = lambda request: "hole" if place in request.key else ""
    process = case.start("first", "--ttl=1", "--grace=8", **behind(proxy))
    wait_for(lambda: proxy.count["hole"])
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert end(process).code == 75
    assert time.monotonic() - began < 8
    proxy.fault = lambda request: ""
    check_finished(case, case.attempt("second", "--ttl=1"))


def list_uploads(case: Case) -> list[dict[str, Any]]:
    return list(S3Store(case.store)._list_uploads())


@pytest.mark.slow
def test_34_an_upload_in_parts_that_was_killed_is_aborted_by_the_next_attempt(case: Case, proxy: FaultProxy) -> None:
    proxy.fault = lambda request: "slow:1" if "partNumber" in request.query else ""
    variables = behind(proxy, LIGHT_PAYLOAD_MIB="24", LIGHT_PART_MIB="5")
    process = case.start("first", "--ttl=1", **variables)
    wait_for(lambda: proxy.count["slow:1"] >= 2)
    send(descendants(process.pid), signal.SIGKILL)
    process.communicate(timeout=60)
    assert list_uploads(case)
    proxy.fault = lambda request: ""
    check_finished(case, case.attempt("second", "--ttl=1", **variables))
    assert list_uploads(case) == []
    assert read_pointer(case.run.objects)


def at_another_time(offset: str) -> dict[str, str]:
    """Return what makes a process believe in a wall clock that is `offset` off; the monotonic clock stays right."""
    package = pytest.importorskip("libfaketime", reason="has no wheel for this processor")
    library = Path(package.__file__).parent / "vendor/libfaketime/src/libfaketime.so.1"
    return {"LD_PRELOAD": str(library), "FAKETIME": offset, "DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_RESET": "1"}


def test_28_a_clock_that_is_wrong_is_12_with_the_seconds_by_which_it_is(case: Case) -> None:
    ended = case.attempt("first", **at_another_time("+2h"))
    assert ended.code == 12, ended.stderr
    assert re.search(r"clock is \+7[12]\d\d s off; set it", ended.result["reason"]), ended.result


@pytest.mark.slow
def test_28_clocks_days_apart_change_nothing_where_no_server_looks_at_them(tmp_path: Path) -> None:
    """A lease is judged by the observer's own waiting, the newest checkpoint by its number."""
    case = Case(str(tmp_path / "store"), tmp_path)
    ahead = case.start("first", "--ttl=2", LIGHT_STEP_S="1", **at_another_time("+3d"))
    wait_for_commit(case)
    committed = check_store(case)
    second = case.attempt("second", "--ttl=1", **at_another_time("-3d"))
    assert second.code == 76, "the first is alive, however old its lease looks"
    send(descendants(ahead.pid), signal.SIGKILL)
    ahead.communicate(timeout=60)
    check_finished(case, case.attempt("third", "--ttl=1", **at_another_time("-3d")))
    assert (resumed_from(case) or 0) >= committed
