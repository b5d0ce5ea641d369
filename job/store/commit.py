"""The commit protocol: who calls what in which order, so that a kill at any moment loses nothing committed.

Layout under the store's URI (DESIGN §5):

    runs/<run-id>/run.json · owner.json · current.json · status.json · result.json · report.html
    runs/<run-id>/checkpoints/e0001-s00000250-<nonce>/{…, rank-00000.json, manifest.json}
    runs/<run-id>/stages/<stage>.json · attempts/<epoch>.json · attempts/<epoch>-checkpoints.json
    models/<name>/<version>/{…, manifest.json} · models/<name>/current.json · order/<name>.json

An attempt begins, in the supervisor's process on node 0 (attempt.py, lease.py):

     1. probe         PUT If-None-Match, GET, PUT If-Match of a probe key      crash: a probe object stays
     2. lease         GET owner.json; PUT If-None-Match, or If-Match where it may be taken; epoch + 1
                                                             crash: the next waits for the TTL at most
     3. fence         PUT current.json If-Match with the new epoch, what it names unchanged
                                                             from here on an older attempt cannot commit
     4. claim         PUT run.json If-None-Match, or compare with the one that is there (16)
     5. ledger        GET the attempts before (18); PUT attempts/<epoch>.json
    5a. order         PUT order/<name>.json If-Match: the number of this run among those of its model; PUT
                      order.json of the run                  crash in between: a number that nobody uses
     6. sweep         abort uploads that no living attempt can finish
     7. restore       current.json → manifest → files, verified; else the next older (restore.py)
    renewal           PUT owner.json If-Match every TTL/4 in a thread; a 412 of somebody else's → 76

A checkpoint, in the uploading threads of the ranks, while training goes on (checkpoints.py). All ranks upload the
same steps in the same order: the votes that also stop them say when every queue is free (background.py):

     8. every rank    uploads its files                      crash: garbage that no manifest names
     9. every rank    PUT rank-NNNNN.json (path → entry)     crash: the same
    10. rank 0        polls until all rank-*.json are there, no collective
    11. rank 0        PUT manifest.json, If-None-Match       crash: whole, but not current
    12. rank 0        PUT current.json, If-Match             ← commit point
    13. rank 0        GET owner.json; deletes all but the last K that were committed: manifests first (retention.py)

A stage record, in the supervisor's process after the stage has left:

    14. GET stages/<stage>.json; GET owner.json (76); PUT If-Match of that GET, or If-None-Match

A release (release.py, promotion.py; `job/releasing.py` calls):

    15. aborts and deletes what an earlier attempt left half uploaded, after GET owner.json; uploads the bundle's
        files; GET owner.json; PUT manifest.json, If-None-Match, or If-Match over a damaged one; GET owner.json: who
        slept before that PUT deletes it again where his successor has deleted the files
    16. GET models/<name>/current.json; perhaps a comparison with what is current; GET owner.json;
        PUT If-Match    ← the release is visible
    17. stage record as in 14; PUT attempts/<epoch>.json; PUT owner.json {released}

A 412 may answer one's own write whose answer was lost: read, compare the nonce (`records.swap`). In
14–16 the pointer is read before the owner, so whoever owns the run by then has either not written
yet, or the swap fails.
"""

from __future__ import annotations

from job.errors import Fenced, NoValidCheckpoint
from job.failpoints import failpoint
from job.store.lease import has_overtaken, verify_owner
from job.store.objects import Blob, PreconditionFailed, Store
from job.store.records import Contention, Record, has_seal, new_nonce, parse_leniently, seal, swap

POINTER = "current.json"

NOTHING: Record = {"step": 0, "manifest": None, "manifest_sha256": None, "older": []}
"""What current.json names before the first commit."""


def fence(objects: Store, epoch: int, attempt: str) -> tuple[Record, str]:
    """Swap current.json to this attempt (call 3); return the pointer as it is now, and its ETag.

    A damaged pointer becomes one that names nothing but has `lost: true`: no proof of absence. So does one that is
    gone, for no attempt writes below checkpoints/ before it has fenced.
    """
    contention = Contention(objects.uri, POINTER)
    while True:
        found, standing = _read_twice(objects)
        if not _is_pointer(standing):
            lost = {"lost": True} if found or any(True for _ in objects.list("checkpoints/")) else {}
            standing = NOTHING | {"epoch": standing.get("epoch", 0)} | lost
        _refuse_overtaken(objects, standing, epoch, attempt)
        pointer = standing | {"epoch": epoch, "attempt": attempt, "nonce": new_nonce()}
        failpoint("fence")
        try:
            etag = write_pointer(objects, pointer, found.etag if found else None)
        except PreconditionFailed:
            contention.wait()
            continue
        failpoint("fenced")
        return pointer, etag


def move_pointer(objects: Store, pointer: Record, etag: str | None) -> str:
    """Swap current.json to `pointer` (call 12); `etag` is that of the pointer this writer wrote last, None at first.

    Returns the new ETag. Raises Fenced (76) when a newer attempt stands there. A damaged pointer is replaced.
    """
    contention = Contention(objects.uri, POINTER)
    while True:
        try:
            if etag is not None:
                return write_pointer(objects, pointer, etag)
            found = objects.read(POINTER)
            standing = parse_leniently(found)
            if has_seal(standing):
                _refuse_overtaken(objects, standing, pointer["epoch"], pointer["attempt"])
            else:  # nothing in it can be believed, its epoch neither
                verify_owner(objects, pointer["epoch"], pointer["attempt"])
            return write_pointer(objects, pointer, found.etag if found else None)
        except PreconditionFailed:
            contention.wait()
            etag = None


def write_pointer(objects: Store, pointer: Record, etag: str | None) -> str:
    """Swap current.json to `pointer`, sealed: with a flipped bit it would name an older checkpoint, or none."""
    return swap(objects, POINTER, seal(pointer), etag)


def read_pointer(objects: Store) -> Record | None:
    """Return {epoch, step, manifest, manifest_sha256, nonce}, or None before the first commit; 17 when damaged."""
    found, pointer = _read_twice(objects)
    if found is None:
        return None
    if not _is_pointer(pointer):
        raise NoValidCheckpoint(f"{objects.uri}/{POINTER}: damaged; run again, which takes the newest valid checkpoint")
    return None if pointer["manifest"] is None else pointer


def read_since(objects: Store) -> int:
    """Return the epoch with which the training of this run began, 0 where nothing can be said of it.

    What attempts before it left was given up (`--fresh`), but may lie there still.
    """
    _, pointer = _read_twice(objects)
    return int(pointer.get("since", 0)) if _is_pointer(pointer) else 0


def _read_twice(objects: Store) -> tuple[Blob | None, Record]:
    """Return what lies at current.json, and its record; what is damaged is read again: on the way, perhaps."""
    found = objects.read(POINTER)
    if found and not _is_pointer(parse_leniently(found)):
        found = objects.read(POINTER)
    return found, parse_leniently(found)


def _is_pointer(record: Record) -> bool:
    """Tell whether a record is as it was written, and names a manifest with its digest, or nothing at all."""
    named = (record.get("manifest", 0), record.get("manifest_sha256", 0))
    numbers = all(type(number) is int for number in (record.get("step"), record.get("since", 0)))
    whole = has_seal(record) and numbers
    return whole and (named == (None, None) or all(isinstance(part, str) and part for part in named))


def _refuse_overtaken(objects: Store, standing: Record, epoch: int, attempt: str) -> None:
    if has_overtaken(standing, epoch, attempt):
        raise Fenced(f"{objects.uri}: attempt {standing['epoch']} owns this run now; this one stops")
