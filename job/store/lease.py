"""The lease of a run, `owner.json`: one attempt at a time may decide what the run's prefix says.

No wall clock decides anything: a lease is taken over when it was released, when its holder is
provably gone (same boot and PID namespace, no such process; or an earlier start of the same SLURM
job), or when its ETag has not changed for the TTL on the observer's monotonic clock: the observer's
or the owner's, whichever is longer. The order of calls stands in `commit.py`.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.errors import Fenced, JobError
from job.failpoints import failpoint
from job.store.objects import Blob, PreconditionFailed, Store
from job.store.records import Contention, Record, has_seal, new_nonce, parse_leniently, swap

log = logging.getLogger("job.store")

OWNER = "owner.json"
_POLL_S = 0.5
_MAX_TTL_S = 86400
"""Of a record; what claims to be silent for longer is not waited for."""


@dataclass(frozen=True)
class Holder:
    """What identifies a process among all machines; `started` is in clock ticks since boot."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    started: str
    slurm_job: str
    slurm_restarts: int

    @staticmethod
    def me() -> Holder:
        """Return this process."""
        return Holder(
            host=platform.node(),
            boot_id=_read(Path("/proc/sys/kernel/random/boot_id")),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            started=_start_ticks(os.getpid()),
            slurm_job="@".join(filter(None, map(os.environ.get, ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME")))),
            slurm_restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        )

    def outlives(self, other: Record) -> bool:
        """Tell whether the holder that `other` describes is provably gone."""
        with suppress(KeyError, TypeError, ValueError):
            if (
                self.slurm_job
                and self.slurm_job == other["slurm_job"]
                and self.slurm_restarts > other["slurm_restarts"]
            ):
                return True
            here = (self.host, self.boot_id, self.pid_namespace)
            if "" not in here and here == (other["host"], other["boot_id"], other["pid_namespace"]):
                return _start_ticks(int(other["pid"])) != other["started"]
        return False


class Lease:
    """A lease that was acquired; a thread renews it every TTL/4 until it is released or lost."""

    def __init__(self, objects: Store, record: Record, etag: str, ttl_s: float) -> None:
        self.epoch, self.nonce = int(record["epoch"]), str(record["nonce"])
        self._objects, self._record, self._ttl_s = objects, record, ttl_s
        self._etag: str | None = etag
        self._lost = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew_forever, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise Fenced (76) when a renewal found another owner; asks nothing of the store."""
        if self._lost:
            raise Fenced(f"{self._objects.uri}: another attempt owns this run now; this one stops")

    def verify(self) -> None:
        """Re-read owner.json; raise Fenced (76) when it is not this attempt's any more."""
        verify_owner(self._objects, self.epoch, self.nonce)

    def release(self) -> None:
        """Give the lease back, so that the next attempt need not wait; a failure costs it the TTL only."""
        self._closed.set()
        self._thread.join()
        if self._lost:
            return
        failpoint("owner-release")
        try:
            self._renew(released=True)
        except JobError as error:
            log.warning("%s; the lease was not released and ends by itself within %.0f s", error, self._ttl_s)
        failpoint("owner-released")

    def _renew_forever(self) -> None:
        while not (self._lost or self._closed.wait(self._ttl_s / 4)):
            try:
                failpoint("owner-renew")
                self._renew()
            except Exception as error:  # an outage: nobody else can take the lease either
                log.warning("the lease could not be renewed: %s", error)

    def _renew(self, **changes: Any) -> None:
        """Swap owner.json; where another attempt owns the run the lease is lost, a damaged one is written anew."""
        try:
            self._swap(**changes)
        except PreconditionFailed:
            found = self._objects.read(OWNER)
            self._lost = _find_other(self._objects, found, self.epoch, self.nonce) is not None
            self._etag = found.etag if found else None
            if not self._lost:
                self._swap(**changes)

    def _swap(self, **changes: Any) -> None:
        record = self._record | {"seq": self._record["seq"] + 1} | changes
        self._etag = swap(self._objects, OWNER, record, self._etag)
        self._record = record


def acquire_lease(objects: Store, ttl_s: float, check: Callable[[], None]) -> Lease:
    """Become the owner of a run: epoch = the highest that owner.json or current.json ever named, + 1.

    `check` is called while waiting and may raise. Raises Fenced (76) when a living owner held the
    lease for 2 × `ttl_s`, or its own where that is longer.
    """
    me, watch, contention = Holder.me(), _Watch(ttl_s), Contention(objects.uri, OWNER)
    while True:
        found = objects.read(OWNER)
        standing = parse_leniently(found)
        watch.heed(standing)
        if found is None or standing.get("released") is True or me.outlives(standing) or watch.is_stale(found.etag):
            try:
                return _take(objects, me, standing, found.etag if found else None, ttl_s)
            except PreconditionFailed:  # somebody was faster: look again
                check()
                contention.wait()
        else:
            watch.tell_and_refuse_when_over(objects.uri, standing)
            check()
            time.sleep(min(_POLL_S, ttl_s / 10))


def verify_owner(objects: Store, epoch: int, nonce: str) -> None:
    """Raise Fenced (76) when another attempt than `epoch` with `nonce` owns the run."""
    if owner := _find_other(objects, objects.read(OWNER), epoch, nonce):
        raise Fenced(f"{objects.uri}: attempt {owner} owns this run now; this one stops")


def _find_other(objects: Store, found: Blob | None, epoch: int, nonce: str) -> object:
    """Return the epoch of the attempt that owns the run by `found`, what owner.json is, or None where it is this one.

    Where owner.json is gone or damaged it names nobody, and its owner writes it anew at the next renewal; who has
    fenced meanwhile stands in current.json.
    """
    standing = parse_leniently(found)
    if "nonce" in standing:
        return None if standing["nonce"] == nonce else standing.get("epoch") or "unknown"
    pointer = parse_leniently(objects.read("current.json"))
    return pointer["epoch"] if has_seal(pointer) and has_overtaken(pointer, epoch, nonce) else None


def has_overtaken(pointer: Record, epoch: int, attempt: str) -> bool:
    """Tell whether current.json is that of a newer attempt, or of another one with the same epoch."""
    other = pointer.get("epoch", 0)
    return bool(other > epoch or (other == epoch and pointer.get("attempt") != attempt))


def _take(objects: Store, me: Holder, standing: Record, etag: str | None, ttl_s: float) -> Lease:
    fenced = parse_leniently(objects.read("current.json")).get("epoch", 0)
    epoch = max(standing.get("epoch", 0), fenced) + 1
    record = {"epoch": epoch, "nonce": new_nonce(), "seq": 0, "released": False, "ttl_s": ttl_s} | asdict(me)
    failpoint("owner-acquire")
    etag = swap(objects, OWNER, record, etag)
    failpoint("owner-acquired")
    if standing.get("released") is False:
        log.warning("took the lease over from attempt %s (%s)", standing.get("epoch"), standing.get("host"))
    return Lease(objects, record, etag, ttl_s)


class _Watch:
    """How long an ETag has not changed, and how long one has waited, on this process' monotonic clock."""

    def __init__(self, ttl_s: float) -> None:
        self._own_ttl_s = self._ttl_s = ttl_s
        self._began = self._changed = time.monotonic()
        self._etag: str | None = None
        self._told = False

    def heed(self, standing: Record) -> None:
        """Take the TTL by which the owner renews its lease, where that is the longer one."""
        theirs, self._ttl_s = standing.get("ttl_s"), self._own_ttl_s
        if isinstance(theirs, (int, float)) and not isinstance(theirs, bool) and theirs <= _MAX_TTL_S:
            self._ttl_s = max(self._own_ttl_s, theirs)

    def is_stale(self, etag: str) -> bool:
        now = time.monotonic()
        if etag != self._etag:
            self._etag, self._changed = etag, now
        return now - self._changed >= self._ttl_s

    def tell_and_refuse_when_over(self, uri: str, standing: Record) -> None:
        owner = f"attempt {standing.get('epoch')} on {standing.get('host')} (pid {standing.get('pid')})"
        if not self._told:
            self._told = True
            log.info("%s: %s owns this run; waiting for it, at most %.0f s", uri, owner, 2 * self._ttl_s)
        if time.monotonic() - self._began > 2 * self._ttl_s:
            raise Fenced(f"{uri}: {owner} is alive and owns this run; stop it first, or use another --run-id")


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_ticks(pid: int) -> str:
    """Return when the process began (proc(5), field 22), "" where there is none: a PID alone may be used again."""
    after_name = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return after_name[19] if len(after_name) > 19 and after_name[0] not in "ZX" else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
