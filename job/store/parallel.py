"""Doing something in a thread beside the caller, or the same to many things in several, until one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Thread
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

LARGE_AT_A_TIME, SMALL_AT_A_TIME = 4, 16
"""So many files are moved: each large one has several connections, a small one mostly waits for its only answer."""


def run_beside(name: str, work: Callable[[], Result]) -> Future[Result]:
    """Do `work` in a thread of this name, which does not keep the process from ending."""
    done: Future[Result] = Future()

    def carry() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # crosses to whoever asks for the result
            done.set_exception(error)

    Thread(target=carry, name=name, daemon=True).start()
    return done


def run_parallel(threads: int, work: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Do `work` on all items, so many at a time; raise the first error, after which nothing more is begun.

    What runs by then is waited for, so that nothing is still written when this is over; but not by who is told to stop.
    """
    over = Event()

    def begin(item: Item) -> None:
        if over.is_set():
            return
        try:
            work(item)
        except BaseException:
            over.set()
            raise

    pool = ThreadPoolExecutor(threads)
    jobs = [pool.submit(begin, item) for item in items]
    try:
        for job in jobs:
            job.result()
    except BaseException as error:
        over.set()
        pool.shutdown(wait=isinstance(error, Exception))
        raise
    pool.shutdown()
