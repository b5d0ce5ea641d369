"""One attempt's hold on a run: lease, fence, ledger, and the writes that only an owner may make.

Lives in the supervisor's process on node 0, from after the sources are fetched until the result is
written. The order of calls stands in `commit.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from job.errors import Fenced
from job.failpoints import failpoint
from job.store.commit import NOTHING, fence, read_pointer, read_since, write_pointer
from job.store.lease import Lease, acquire_lease
from job.store.ledger import Ledger, describe_attempt, read_attempt
from job.store.objects import PreconditionFailed, Store
from job.store.probe import probe_conditional_writes
from job.store.records import Contention, Record, dump, has_seal, new_nonce, parse_leniently, seal, swap
from job.store.restore import Restored, list_manifests, parse_name, restore_newest
from job.store.runs import RunStore
from job.store.transfer import sweep_unfinished

log = logging.getLogger("job.store")


class Attempt:
    """See the module. `epoch` is higher than that of every attempt before."""

    def __init__(self, store: RunStore, ttl_s: float, check: Callable[[], None]) -> None:
        """Probe, acquire the lease, fence (calls 1–3); `check` is called meanwhile and may raise."""
        probe_conditional_writes(store.objects)
        self.store = store
        self._lease: Lease = acquire_lease(store.objects, ttl_s, check)
        self._ledger: Ledger | None = None
        try:
            check()
            self._pointer, self._etag = fence(store.objects, self._lease.epoch, self._lease.nonce)
            check()
        except BaseException:
            self._lease.release()
            raise

    @property
    def epoch(self) -> int:
        """The number of this attempt."""
        return self._lease.epoch

    @property
    def nonce(self) -> str:
        """What marks this attempt's writes."""
        return self._lease.nonce

    @property
    def since(self) -> int:
        """The epoch with which the training of this run began; checkpoints of older epochs were given up."""
        return int(self._pointer.get("since") or 0)

    def check(self) -> None:
        """Raise Fenced (76) when the lease was lost; asks nothing of the store."""
        self._lease.check()

    def verify(self) -> None:
        """Re-read owner.json; raise Fenced (76) when another attempt owns this run."""
        self._lease.verify()

    def start_over(self, stages: list[str]) -> None:
        """Forget what was committed: the pointer first, which is the commit, then records and manifests.

        Whoever was stopped in between and wakes up after a take-over leaves what the newer attempt wrote.
        """
        pointer = NOTHING | {"since": self.epoch, "epoch": self.epoch, "attempt": self.nonce, "nonce": new_nonce()}
        try:
            self._etag = write_pointer(self.store.objects, pointer, self._etag)
        except PreconditionFailed:
            raise Fenced(f"{self.store.uri}: another attempt owns this run now; this one stops") from None
        self._pointer = pointer
        objects = self.store.objects
        for name in reversed(stages):
            self.verify()
            objects.delete([f"stages/{name}.json"])
        self.verify()
        objects.delete(["order.json"])  # it begins now, as far as its model's releases are concerned
        objects.delete([key for key in list_manifests(objects) if (parse_name(key) or (0, 0))[0] < self.epoch])

    def begin(self, work: str, stages: list[str]) -> None:
        """Enter the ledger and sweep (calls 5–6); raise NoProgress (18). `work` is a hash of what is tried."""
        from job.recipe import hash_json  # whoever begins has read a recipe; others should not wait for its classes

        committed = {name: (read_stage(self.store.objects, name, self.since) or {}).get("outputs") for name in stages}
        progress = hash_json([self._pointer["manifest"], committed])
        ledger = Ledger(self.store, self.epoch, work, progress)
        self._ledger = ledger
        ledger.begin()
        self.verify()
        if swept := sweep_unfinished(self.store.objects):
            self.note("swept", uploads=swept)

    def restore(self, folder: Path, max_bytes: int) -> Restored | None:
        """Fetch the newest whole checkpoint into `folder` (call 7); None only where nothing was ever committed."""
        failpoint("resume-fetch")
        restored = restore_newest(self.store.objects, self._pointer, folder, max_bytes)
        failpoint("resume-fetched")
        for key in restored.damaged if restored else []:
            self.note("damaged checkpoint passed over", manifest=key)
        if restored:
            self.note("resumed", manifest=restored.key, step=restored.manifest.about["step"])
        return restored

    def list_attempts(self) -> list[Record]:
        """Return {epoch, began, ended, exit_code, resumed_from} of every attempt since the training began, this too."""
        found = [read_attempt(self.store, epoch) for epoch in range(max(self.since, 1), self.epoch + 1)]
        return [describe_attempt(record) for record in found if record]

    def current_checkpoint(self) -> Record | None:
        """Return what current.json names now."""
        return read_pointer(self.store.objects)

    def commit_record(self, name: str, record: Record) -> None:
        """Commit a stage's record (call 14); raise Fenced (76) when another attempt owns this run."""
        sealed = seal(record | {"epoch": self.epoch, "nonce": new_nonce()})
        self._replace(f"stages/{name}.json", sealed, lambda: failpoint("stage-record"))
        failpoint("stage-recorded")
        self.note("stage committed", stage=name)

    def claim(self, about: Record) -> None:
        """Let run.json say what this run is, whatever it said; raise Fenced (76) when another attempt owns the run."""
        self._replace("run.json", about)

    def _replace(self, key: str, record: Record, before: Callable[[], None] = lambda: None) -> None:
        """Swap an object that only the run's owner may write; `before` is called between asking and writing."""
        objects = self.store.objects
        contention = Contention(objects.uri, key)
        while True:
            found = objects.read(key)
            self.verify()
            before()
            # An older attempt that slept between its own `verify` and its write may be the one that was faster: who
            # owns the run decides, not who wrote first.
            with suppress(PreconditionFailed):
                swap(objects, key, record, found.etag if found else None)
                return
            contention.wait()

    def note(self, event: str, **about: object) -> None:
        """Leave an event for `job show --events`."""
        if self._ledger:
            self._ledger.note(event, **about)

    def leave(self, result: Record) -> None:
        """Write the result, end the ledger, release the lease (call 17); nothing of it raises."""
        for write in (self._write_end, lambda _: self._lease.release()):
            try:
                write(result)
            except Exception as error:  # what was done stays done: no trouble here may change the run's exit code
                log.warning("the end of this attempt could not be written: %s", error)

    def _write_end(self, result: Record) -> None:
        self.verify()
        self.store.objects.write("result.json", dump(result))
        if self._ledger:
            self._ledger.end(int(result["exit_code"]), str(result["reason"]), result.get("status") == "retried")


def read_stage(objects: Store, name: str, since: int | None = None) -> Record | None:
    """Return a stage's record; None where there is none, where it is not what was written, or of what was given up.

    `since` is the epoch with which the training began, as the owner of the run knows it; else the pointer is asked.
    """
    record = parse_leniently(objects.read(f"stages/{name}.json"))
    if record and not has_seal(record):
        log.warning("stages/%s.json is damaged: the stage is done again", name)
    if not has_seal(record):
        return None
    # the pointer is read after the record, as `start_over` first writes the one and then deletes the other
    return record if record.get("epoch", 0) >= (read_since(objects) if since is None else since) else None
