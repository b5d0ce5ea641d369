"""Many things at a time: the first error ends it, and whoever is told to stop waits for nobody."""

from __future__ import annotations

import time
from threading import Event, Lock

import pytest

from job.store.parallel import run_parallel


def test_all_is_done() -> None:
    done, lock = [], Lock()

    def work(item: int) -> None:
        with lock:
            done.append(item)

    run_parallel(4, work, range(100))
    assert sorted(done) == list(range(100))


def test_after_an_error_nothing_is_begun_and_what_runs_is_waited_for() -> None:
    begun, ended, failing = [], Event(), Event()

    def work(item: int) -> None:
        begun.append(item)
        if item == 0:
            failing.wait(10)
            raise OSError("the disk is full")
        failing.set()
        time.sleep(0.3)
        ended.set()

    with pytest.raises(OSError, match="full"):
        run_parallel(2, work, range(1000))
    assert ended.is_set()
    assert len(begun) <= 3


def test_who_is_told_to_stop_does_not_wait_for_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = Event()

    def stop(job: object, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.result", stop)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_parallel(2, lambda item: let_go.wait(30), range(2))
    assert time.monotonic() - began < 10
    let_go.set()
