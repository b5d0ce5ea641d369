"""Starting, signalling and ending light runs (`light.py`), and what must hold of a store after any was killed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from light import final_state

from job.errors import NotFound
from job.store import RunStore, open_store
from job.store.attempt import read_stage
from job.store.commit import read_pointer
from job.store.inventory import verify_uri
from job.store.restore import fetch_checkpoint, list_older

LIGHT = Path(__file__).parent / "light.py"
STEPS = 12


@dataclass(frozen=True)
class Case:
    """One run: where it stores, and where its attempts work."""

    store: str
    place: Path
    ranks: int = 1
    run_id: str = "run-1"

    @property
    def run(self) -> RunStore:
        return RunStore(self.store, self.run_id)

    def command(self, work: str, *words: str) -> list[str]:
        options = [f"--steps={STEPS}", f"--ranks={self.ranks}", *words]
        return [sys.executable, str(LIGHT), self.store, self.run_id, str(self.place / work), *options]

    def start(self, work: str, *words: str, **variables: str) -> subprocess.Popen[str]:
        """Start an attempt in a session of its own."""
        return subprocess.Popen(
            self.command(work, *words),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | variables,
            start_new_session=True,
        )

    def attempt(self, work: str, *words: str, **variables: str) -> Ended:
        """Run an attempt to its end."""
        return end(self.start(work, *words, **variables))


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: exit code, result line where there is one, stderr."""

    code: int
    result: dict[str, Any]
    stderr: str


def end(process: subprocess.Popen[str]) -> Ended:
    """Wait for an attempt; one that was killed has an empty result."""
    stdout, stderr = process.communicate(timeout=180)
    lines = stdout.strip().splitlines()
    return Ended(process.returncode, json.loads(lines[-1]) if lines else {}, stderr)


def wait_for(what: Callable[[], object], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_training(log: str) -> bool:
    """Whether a rank has said what it trains: the first step is next."""
    return re.search(r"training \d+ weights on \d+ rank", log) is not None


def wait_for_commit(case: Case) -> None:
    wait_for(lambda: case.run.objects.read("current.json") and read_pointer(case.run.objects))


def suspend(case: Case, pids: list[int]) -> None:
    """Stop processes, but in no moment in which one holds the folder's lock: who waits for that gives up with 77."""
    send(pids, signal.SIGSTOP)
    while time.sleep(0.05) or _is_locked(case.run.objects.uri):
        send(pids, signal.SIGCONT)
        time.sleep(0.01)
        send(pids, signal.SIGSTOP)


def _is_locked(uri: str) -> bool:
    if uri.startswith("s3://"):
        return False
    handle = os.open(uri, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def descendants(pid: int) -> list[int]:
    """Return the process and everything below it."""
    found = [pid]
    for parent in found:
        with suppress(OSError):
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def check_store(case: Case) -> int:
    """Assert that whatever the store names can be verified; return the committed step, 0 where there is none."""
    run = case.run
    scratch = Path(tempfile.mkdtemp(dir=case.place))
    pointer = read_pointer(run.objects)
    for entry in [pointer, *list_older(pointer)] if pointer else []:
        folder = scratch / entry["manifest_sha256"]
        fetch_checkpoint(run.objects, entry["manifest"], entry["manifest_sha256"], folder)
    for stage in ("train", "quantize", "release"):
        assert run.objects.read(f"stages/{stage}.json") is None or read_stage(run.objects, stage)
    model = f"{case.store}/models/light"
    if open_store(model).read("current.json"):
        assert verify_uri(model, scratch / "release")[1] == []
    shutil.rmtree(scratch)
    return int(pointer["step"]) if pointer else 0


def check_finished(case: Case, ended: Ended) -> None:
    """Assert that the run was released whole, with the state that an uninterrupted run has."""
    assert ended.code == 0, ended.stderr
    check_store(case)
    for rank in range(case.ranks):
        assert json.loads(fetch_final(case, f"state-{rank:05d}.json"))["state"] == final_state(STEPS, rank)
    release = str(ended.result["release"])
    assert verify_uri(release, case.place / "verify")[1] == []
    blob = open_store(release).read("state.txt")
    assert blob is not None
    assert blob.data.decode() == final_state(STEPS)
    versions = {item.key.split("/")[0] for item in open_store(f"{case.store}/models/light").list("")}
    assert versions == {"current.json", release.rpartition("/")[2]}, "exactly one release"


def fetch_final(case: Case, name: str) -> str:
    pointer, folder = read_pointer(case.run.objects), case.place / "final"
    assert pointer is not None
    fetch_checkpoint(case.run.objects, pointer["manifest"], pointer["manifest_sha256"], folder)
    return (folder / name).read_text()


def resumed_from(case: Case) -> int | None:
    record = read_stage(case.run.objects, "train")
    if record is None:
        raise NotFound("no train record")
    return record["record"]["resumed_from"]
