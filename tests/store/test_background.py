"""Upload beside the training: bounded, newest wins, and whatever goes wrong reaches the loop."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from job.errors import AccessDenied, JobError, Unreachable
from job.store.background import BackgroundUploader


def test_while_one_upload_runs_the_newest_waits_and_the_others_are_dropped(tmp_path: Path) -> None:
    started, go_on, uploaded, dropped = threading.Event(), threading.Event(), [], []

    def upload(folder: Path) -> None:
        started.set()
        go_on.wait()
        uploaded.append(folder.name)

    uploader = BackgroundUploader(upload, lambda folder: dropped.append(folder.name), 60)
    uploader.submit(tmp_path / "1")
    started.wait()
    for name in ("2", "3", "4"):
        uploader.submit(tmp_path / name)
    go_on.set()
    uploader.close()
    assert (uploaded, dropped) == (["1", "4"], ["2", "3"])


def test_closing_waits_for_what_was_submitted_and_shows_that_it_waits(tmp_path: Path) -> None:
    go_on, done = threading.Event(), []

    def upload(folder: Path) -> None:
        go_on.wait()
        done.append(folder.name)

    waits: list[int] = []

    def on_wait() -> None:
        waits.append(1)
        if len(waits) > 2:
            go_on.set()

    uploader = BackgroundUploader(upload, lambda folder: None, 60)
    uploader.submit(tmp_path / "1")
    uploader.close(on_wait)
    assert done == ["1"]
    assert len(waits) >= 3


def test_a_permanent_error_reaches_the_training(tmp_path: Path) -> None:
    def upload(folder: Path) -> None:
        raise AccessDenied("the key was withdrawn")

    uploader = BackgroundUploader(upload, lambda folder: None, 60)
    uploader.submit(tmp_path / "1")
    for call in (uploader.close, uploader.check, lambda: uploader.submit(tmp_path / "2")):
        with pytest.raises(AccessDenied, match="withdrawn"):
            call()


def test_an_unreachable_store_is_tried_again_until_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.store.background._RETRY_S", 0.01)
    answers: list[JobError | None] = [Unreachable("503"), Unreachable("503"), None]

    def upload(folder: Path) -> None:
        if answer := answers.pop(0):
            raise answer

    uploader = BackgroundUploader(upload, lambda folder: None, 60)
    uploader.submit(tmp_path / "1")
    uploader.close()
    assert answers == []

    def upload_never(folder: Path) -> None:
        raise Unreachable("503")

    uploader = BackgroundUploader(upload_never, lambda folder: None, 0.05)
    uploader.submit(tmp_path / "1")
    with pytest.raises(Unreachable) as caught:
        uploader.close()
    assert caught.value.exit_code == 77


def test_after_an_outage_the_newest_is_uploaded_and_the_one_that_failed_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.store.background._RETRY_S", 0.01)
    newer_waits, uploaded, dropped = threading.Event(), [], []

    def upload(folder: Path) -> None:
        if folder.name == "1":
            newer_waits.wait()
            raise Unreachable("503")
        uploaded.append(folder.name)

    uploader = BackgroundUploader(upload, lambda folder: dropped.append(folder.name), 60)
    uploader.submit(tmp_path / "1")
    uploader.submit(tmp_path / "2")
    newer_waits.set()
    uploader.close()
    assert (uploaded, dropped) == (["2"], ["1"])


@pytest.mark.parametrize("slow", [(0.03, 0.03), (0.05, 0.001), (0.001, 0.07), (0.04, 0.06)], ids=str)
def test_queues_in_step_upload_the_same_checkpoints_however_slow_each_is(
    tmp_path: Path, slow: tuple[float, float]
) -> None:
    """As two ranks do: after each step the answers to the last question are read, and the next question is put."""
    uploaded: list[list[str]] = [[], []]

    def make(rank: int) -> BackgroundUploader:
        def upload(folder: Path) -> None:
            time.sleep(slow[rank])
            uploaded[rank].append(folder.name)

        return BackgroundUploader(upload, lambda folder: None, 60, in_step=True)

    queues, free = [make(0), make(1)], False
    for step in range(60):
        time.sleep(0.005)
        for queue in queues if free else ():
            queue.open_gate()
        free = all(queue.is_free for queue in queues)
        for queue in queues if step % 2 else ():
            queue.submit(tmp_path / f"{step:02d}")
    for queue in queues:
        queue.close()
    assert uploaded[0] == uploaded[1] == sorted(set(uploaded[0]))
    assert uploaded[0][0] == "01", "the first goes at once"
    assert uploaded[0][-1] == "59", "the last goes when the queue is closed"
    took = max(slow) / 0.01  # in saves
    assert len(uploaded[0]) >= 30 / (took + 3), "uploads follow each other closely"


def test_a_queue_in_step_goes_on_with_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.store.background._RETRY_S", 0.01)
    answers: list[JobError | None] = [Unreachable("503"), None, None]
    uploaded: list[str] = []

    def upload(folder: Path) -> None:
        if answer := answers.pop(0):
            raise answer
        uploaded.append(folder.name)

    uploader = BackgroundUploader(upload, lambda folder: None, 60, in_step=True)
    uploader.submit(tmp_path / "1")
    uploader.submit(tmp_path / "2")
    uploader.close()
    assert uploaded == ["1", "2"]
