"""Death at every named place of the protocols: what the store names stays verifiable, and the next attempt finishes."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cases import Case, check_finished, check_store, resumed_from

import job
from job.failpoints import FAILPOINTS
from job.store.attempt import read_stage

IN_A_RANK = FAILPOINTS[FAILPOINTS.index("checkpoint-write") : FAILPOINTS.index("retired") + 1]


def test_the_failpoints_are_34_and_each_stands_in_the_code() -> None:
    sources = "".join(path.read_text() for path in Path(job.__file__).parent.rglob("*.py"))
    reached = set(re.findall(r'failpoint\("([a-z-]+)"\)', sources))
    assert len(FAILPOINTS) == len(set(FAILPOINTS)) == 34
    assert reached == set(FAILPOINTS)


def die_and_recover(place: Path, name: str, action: str, ranks: int = 1) -> None:
    """Let an attempt meet the failpoint, check the store, start again on an empty disk, check the end."""
    place.mkdir(parents=True)
    case = Case(str(place / "store"), place, ranks)
    if name in ("resume-fetch", "resume-fetched"):
        interrupt_once(case)
    before = check_store(case)
    # so slow that every checkpoint is uploaded before the next one replaces it, and the lease is renewed
    slow = {"LIGHT_STEP_S": "0.4"} if name == "owner-renew" or name.startswith("retire") else {}
    times = "@2" if name in IN_A_RANK and not name.startswith("retire") else "@1"
    ended = case.attempt("first", "--ttl=1", JOB_FAILPOINT=f"{name}={action}{times}", **slow)
    committed = check_store(case)
    assert committed >= before
    assert_died(name, action, ended.code)
    trained = read_stage(case.run.objects, "train")
    again = case.attempt("second", "--ttl=1")
    check_finished(case, again)
    if committed and not trained:
        assert (resumed_from(case) or 0) >= committed, "what was committed is never trained again"
    left = {item.key.split("/")[1] for item in case.run.objects.list("checkpoints/") if "manifest" in item.key}
    assert len(left) <= 2


def assert_died(name: str, action: str, code: int) -> None:
    """The failpoint was met, and the exit code is the one of DESIGN §2."""
    expected = {
        "kill": {79} if name in IN_A_RANK else {-9},
        "term": {75, 0} if name.startswith(("ledger-end", "owner-rel", "release-p", "stage-recorded")) else {75},
        "raise": {0} if name in ("owner-renew", "owner-release", "owner-released", "ledger-end") else {1},
    }[action]
    if action == "raise" and name in ("ledger-end", "owner-release", "owner-released"):
        expected = {0, 1}
    if action == "term" and name in ("release-manifest", "release-manifest-written", "release-files"):
        expected = {75, 0}
    assert code in expected, f"{name}={action}: {code}"


def interrupt_once(case: Case) -> None:
    ended = case.attempt("zeroth", "--ttl=1", JOB_FAILPOINT="pointer=kill@3")
    assert ended.code == 79


def run_all(tmp_path: Path, action: str, names: tuple[str, ...], ranks: int = 1) -> None:
    """Two cases at a time: most of each is waiting for interpreters to start."""
    with ThreadPoolExecutor(3) as pool:
        jobs = {name: pool.submit(die_and_recover, tmp_path / name, name, action, ranks) for name in names}
    failures = {name: job.exception() for name, job in jobs.items()}
    assert {name: repr(error)[-1500:] for name, error in failures.items() if error} == {}


def test_sigkill_at_every_failpoint_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    run_all(tmp_path, "kill", FAILPOINTS)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["term", "raise"])
def test_a_signal_or_an_error_at_every_failpoint_loses_nothing(tmp_path: Path, action: str) -> None:
    run_all(tmp_path, action, FAILPOINTS)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["kill", "raise"])
def test_the_same_with_two_ranks(tmp_path: Path, action: str) -> None:
    run_all(tmp_path, action, IN_A_RANK, ranks=2)
