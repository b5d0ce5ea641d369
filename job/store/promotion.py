"""Which release of a model its users follow: calls 5a and 16 of `commit.py`.

models/<name>/current.json  {version, order, before, why, nonce}: `before` are the versions that were current until
                            then, newest first, for a rollback; `why` is what the promotion was decided by
order/<name>.json           {last, nonce}: how many runs have begun to make a release of this model

A run takes a number when it begins. Its release never takes the pointer from that of a run with a higher number, so
an older night that ends late changes nothing, whoever promoted that release. No clock is asked.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from job.errors import CheckpointMismatch, Fenced, NotFound, NoValidCheckpoint
from job.store.manifest import Manifest
from job.store.objects import PreconditionFailed, Store, check_key, open_room
from job.store.records import Contention, Record, new_nonce, parse_leniently, swap
from job.store.restore import find_missing, require_manifest

if TYPE_CHECKING:
    from job.recipe.schema import Store as Address  # to build its classes takes time that most verbs have not

log = logging.getLogger("job.store")

POINTER = "current.json"
_KEPT_VERSIONS = 50


@dataclass(frozen=True)
class Standing:
    """What the pointer says, and the ETag that a change of it must name; `version` None: nothing is current.

    `damaged`: something lies there that is no whole pointer, so anything may be current, or nothing.
    """

    version: str | None
    order: int
    before: list[str]
    why: Record
    etag: str | None
    damaged: bool = False


class ModelPointer:
    """The pointer of one model, at whose prefix `objects` is opened."""

    def __init__(self, objects: Store) -> None:
        self._objects = objects

    @staticmethod
    def of(address: Address, name: str) -> ModelPointer:
        """Return the pointer of the model `name` in a recipe's store."""
        return ModelPointer(open_room(address, f"models/{name}"))

    def read(self) -> Standing:
        """Return what is current now; of a damaged pointer what can be read, and `job release promote` mends it."""
        standing = self._read_once()
        if standing.damaged:  # on the way, perhaps: where it is damaged at rest it comes so again
            standing = self._read_once()
        if standing.damaged:
            log.warning("%s/%s is damaged; `job release promote` mends it", self._objects.uri, POINTER)
        return standing

    def _read_once(self) -> Standing:
        blob = self._objects.read(POINTER)
        record = parse_leniently(blob)
        if "manifest" in record:
            raise CheckpointMismatch(f"{self._objects.uri}: is a run, not a model; name …/models/<name>")
        version, before, why = record.get("version"), record.get("before", []), record.get("why")
        whole = isinstance(version, str) and isinstance(before, list) and type(record.get("order", 0)) is int
        return Standing(
            version if isinstance(version, str) else None,
            _number(record, "order"),
            [str(other) for other in before] if isinstance(before, list) else [],
            why if isinstance(why, dict) else {},
            blob.etag if blob else None,
            blob is not None and not whole,
        )

    def read_whole(self) -> Standing:
        """Return what is current now; NoValidCheckpoint (17) where the pointer is damaged."""
        standing = self.read()
        if standing.damaged:
            raise NoValidCheckpoint(
                f"{self._objects.uri}/{POINTER}: is damaged, so what is current is not known; name it with "
                "`job release promote`, then again"
            )
        return standing

    def move(self, standing: Standing, version: str, order: int, why: Record) -> bool:
        """Let the pointer name `version`; False, and nothing is changed, where it is not `standing` any more."""
        before = [other for other in (standing.version, *standing.before) if other not in (None, version)]
        record = {"version": version, "order": max(order, standing.order), "before": before[:_KEPT_VERSIONS]}
        try:
            swap(self._objects, POINTER, record | {"why": why, "nonce": new_nonce()}, standing.etag)
        except PreconditionFailed:
            return False
        return True

    def promote(self, version: str) -> Standing:
        """Let a person name the current version; NotFound (13) for one that is no release, or not whole."""
        order = _number(self._require(version).about, "order")
        contention = Contention(self._objects.uri, POINTER)
        while not self.move(self.read(), version, order, {"reason": "promoted by hand"}):
            contention.wait()
        self._require(version)  # asked again: a pruning may have deleted it before it could see the pointer there
        return self.read()

    def rollback(self) -> Standing:
        """Go back to the version that was current before this one; return what is current then.

        Raises NotFound (13) where there is none, Fenced (76) where another moved the pointer at the same time,
        NoValidCheckpoint (17) where it is damaged.
        """
        standing = self.read_whole()
        if not standing.before:
            raise NotFound(f"{self._objects.uri}: no version was current before; `job release list` shows all")
        version, *before = standing.before
        self._require(version)
        # what is left by going back is not what the next rollback should lead to
        left = replace(standing, version=None, before=before)
        if not self.move(left, version, 0, {"reason": f"rolled back from {standing.version}"}):
            raise Fenced(
                f"{self._objects.uri}: the pointer was moved meanwhile; look at `job release list`, then again"
            )
        return self.read()

    def _require(self, version: str) -> Manifest:
        key = f"{check_key(version)}/manifest.json"
        if "/" in version:
            raise NotFound(f"{version}: is no version; `job release list` shows what there is")
        manifest = require_manifest(self._objects, key)
        if manifest.kind != "release":
            raise NotFound(f"{self._objects.uri}/{key}: is no release; `job release list` shows what there is")
        if missing := find_missing(self._objects, manifest, f"{version}/"):
            raise NotFound(
                f"{self._objects.uri}/{missing[0]}: is gone ({len(missing)} of {len(manifest.files)} files); pick "
                "another version, `job release list` shows what there is"
            )
        return manifest


def take_order(address: Address, name: str) -> int:
    """Return the number of a run of model `name` that begins now: nobody else gets it, later ones get higher ones."""
    objects, pointer, key = open_room(address), ModelPointer.of(address, name), f"order/{name}.json"
    contention = Contention(objects.uri, key)
    while True:
        found = objects.read(key)
        # a lost or damaged counter goes on above what is current: nothing would be promoted otherwise
        number = max(_number(parse_leniently(found), "last"), pointer.read().order) + 1
        try:
            swap(objects, key, {"last": number, "nonce": new_nonce()}, found.etag if found else None)
        except PreconditionFailed:
            contention.wait()
            continue
        return number


def _number(record: Record, key: str) -> int:
    value = record.get(key, 0)
    return value if type(value) is int and value >= 0 else 0
