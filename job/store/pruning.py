"""Deleting old releases of a model, and the runs that made them (`job release prune`).

Kept are the newest, the current one, the one that a rollback leads to, and every release that another release or a
run that goes on was made of. A manifest goes before the objects that it names, so that half a release is none. Of a
run nothing is touched but where its release is gone or goes, and nobody owns it. What was listed is asked for once more
before it goes: other nights release, and people promote, meanwhile.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from job.errors import Fenced, NotFound, NoValidCheckpoint
from job.store.lease import OWNER, acquire_lease
from job.store.objects import Store, open_store, split_uri
from job.store.probe import probe_conditional_writes
from job.store.promotion import ModelPointer
from job.store.records import dig, parse_leniently
from job.store.restore import read_manifest

log = logging.getLogger("job.store")

RELEASED = "stages/release.json"
"""By its record of this stage a run is known to have released, and is found where its release is gone."""

_TTL_S = 30.0


class Version(NamedTuple):
    """A release: `order` is its run's number among those of its model, `why` it is kept, "" for one that goes."""

    name: str
    order: int
    why: str


class Pruner:
    """The releases of the model at `uri`, …/models/<name>; NotFound (13) for another address."""

    def __init__(self, uri: str, *, allow_http: bool = False, single_writer: bool = False) -> None:
        parent, self._name = split_uri(uri)
        self._root, room = split_uri(parent)
        if room != "models":
            raise NotFound(f"{uri}: is no model; name …/models/<name>")
        self._allow_http, self._single_writer = allow_http, single_writer
        self._whole, self._objects = self._open(""), self._open(f"/models/{self._name}")
        self._pointer = ModelPointer(self._objects)

    def plan(self, keep: int) -> list[Version]:
        """Return all releases, newest first: the newest `keep` stay, and what is needed.

        Raises NotFound (13) where there is none, NoValidCheckpoint (17) where a damaged pointer hides what is current.
        """
        return self._plan(keep, list(_list_origins(self._whole)), dict(_list_made(self._whole, self._name)))

    def _plan(self, keep: int, origins: list[Origin], made: dict[str, str]) -> list[Version]:
        standing = self._pointer.read_whole()
        going = {f"{origin.going}-" for origin in origins if origin.going}
        kept = dict.fromkeys(_find_parents(origins, self._name), "chained")
        kept |= dict.fromkeys(standing.before[:1], "rollback")
        kept |= {standing.version: "current"} if standing.version else {}
        last = set(made.values())  # of the releases of one run, which have one order, its last is the newest
        found = sorted(
            _list_releases(self._objects), key=lambda each: (each[1], each[0] in last, each[0]), reverse=True
        )
        # what a run has published and still compares with the current release
        kept = {version: "going" for version, _ in found if version[:-8] in going} | kept
        if not found:
            raise NotFound(f"{self._objects.uri}: no release of a model lies there; name …/models/<name>")
        return [
            Version(version, order, kept.get(version) or ("newest" if place < keep else ""))
            for place, (version, order) in enumerate(found)
        ]

    def prune(self, keep: int, own_run: str = "", own_version: str = "") -> tuple[list[str], list[str]]:
        """Delete what `plan` lets go, then the runs whose release is no more; return versions and run ids.

        The run that calls this, and what it has just released, are left to a later pruning. Raises RecipeError (10),
        and nothing is deleted, where the store has no conditional writes, on which the lease of a run hangs.
        """
        probe_conditional_writes(self._objects)
        origins, made = list(_list_origins(self._whole)), dict(_list_made(self._whole, self._name))
        going = [each.name for each in self._plan(keep, origins, made) if not each.why and each.name != own_version]
        gone = [version for version in going if self._delete_release(version)]
        stay = {own_run, *_find_pinned_runs(origins)}
        over = [(run, version) for run, version in made.items() if run not in stay and self._is_gone(version)]
        return gone, [run for run, version in over if self._delete_run(run, version)]

    def _is_followed(self, version: str) -> bool:
        """Tell whether users follow a version now, or would after a rollback: a person may have just promoted it."""
        standing = self._pointer.read_whole()
        return version in (standing.version, *standing.before[:1])

    def _is_gone(self, version: str) -> bool:
        """Tell whether a version is no release any more; no list is asked, for it may be older than the release."""
        return self._objects.read(f"{version}/manifest.json") is None and not self._is_followed(version)

    def _delete_release(self, version: str) -> bool:
        """Delete a release that nobody follows; False, and it is whole, where somebody does."""
        key = f"{version}/manifest.json"
        manifest = self._objects.read(key)
        if manifest is None or self._is_followed(version):
            return False
        self._objects.delete([key])
        if self._is_followed(version):  # promoted between the two calls
            self._objects.write(key, manifest.data)
            return False
        self._objects.delete([item.key for item in self._objects.list(f"{version}/")])
        return True

    def _delete_run(self, run: str, version: str) -> bool:
        """Delete a run that nobody owns and whose last release was `version`, which is gone; else False."""
        objects = self._open(f"/runs/{run}")
        try:
            lease = acquire_lease(objects, _TTL_S, _limit_waiting(objects.uri))
        except Fenced as error:
            log.warning("%s; it is left alone", error)
            return False
        try:
            # it may have released anew before the lease was had
            if _read_made(objects, self._name) != version or not self._is_gone(version):
                return False
            self._objects.delete([item.key for item in self._objects.list(f"{version}/")])  # a pruning was cut short
            keys = [item.key for item in objects.list("") if item.key not in (OWNER, RELEASED)]
            objects.delete([key for key in keys if key.endswith("manifest.json") or key == "current.json"])
            lease.verify()
            objects.delete(keys)
        finally:
            lease.release()
        objects.delete([OWNER])
        objects.delete([RELEASED])  # the last of it: by this the run is found again where anything above fails
        return True

    def _open(self, prefix: str) -> Store:
        return open_store(f"{self._root}{prefix}", allow_http=self._allow_http, single_writer=self._single_writer)


def _list_releases(objects: Store) -> Iterator[tuple[str, int]]:
    """Yield (version, order) of every whole release; what has no manifest is being uploaded."""
    for item in list(objects.list("")):
        version, _, rest = item.key.partition("/")
        if rest != "manifest.json":
            continue
        try:
            about = read_manifest(objects, item.key).about
        except NoValidCheckpoint as error:
            log.warning("%s; it is left alone", error)
            continue
        order = about.get("order")
        yield version, order if type(order) is int else 0


class Origin(NamedTuple):
    """What a release or a run is made of: a parent release, by URI or version alone, and the model that was named.

    `going` is the id of a run that has not ended with a release yet.
    """

    parent: str
    model: str
    going: str = ""


def _list_origins(whole: Store) -> Iterator[Origin]:
    """Yield what every release and run of a store is made of."""
    keys = {item.key for item in whole.list("")}
    for key in keys:
        parts = key.split("/")
        if parts[0] == "models" and parts[-1] == "manifest.json" and len(parts) == 4:
            about = dig(parse_leniently(whole.read(key)), "about")
            yield Origin(str(dig(about, "parent") or ""), str(dig(about, "model", "id")))
        if parts[0] == "runs" and parts[2:] == ["run.json"]:
            about = parse_leniently(whole.read(key))
            going = "" if f"runs/{parts[1]}/{RELEASED}" in keys else parts[1]
            parent = str(dig(about, "parent") or "") if going else ""  # of one that has released its release says so
            yield Origin(parent, str(dig(about, "recipe", "model", "id")), going)


def _find_parents(origins: list[Origin], name: str) -> Iterator[str]:
    """Yield the versions of model `name` that releases were made of, or that a run which goes on names."""
    pattern = re.compile(rf"models/{re.escape(name)}/([^/]+)/?$")
    for origin in origins:
        yield origin.parent.rpartition("/")[2]
        if origin.going:
            yield from pattern.findall(origin.model)


def _find_pinned_runs(origins: list[Origin]) -> Iterator[str]:
    """Yield the runs whose checkpoints other runs or releases are made of."""
    for origin in origins:
        for uri in (origin.parent, origin.model):
            yield from re.findall(r"/runs/([^/]+)/checkpoints/", uri)


def _list_made(whole: Store, name: str) -> Iterator[tuple[str, str]]:
    """Yield (run, version) of the runs that have released model `name`: the version is the last that each has made."""
    for item in list(whole.list("runs/")):
        run, _, key = item.key.removeprefix("runs/").partition("/")
        if key == RELEASED and (version := _read_made(whole, name, f"runs/{run}/")):
            yield run, version


def _read_made(objects: Store, name: str, run: str = "") -> str:
    """Return the version of model `name` that a run, whose prefix is `run`, has made last, "" for none."""
    release = str(dig(parse_leniently(objects.read(f"{run}{RELEASED}")), "record", "release") or "")
    model, _, version = release.rpartition("/")
    return version if model.endswith(f"/models/{name}") else ""


def _limit_waiting(uri: str) -> Callable[[], None]:
    """Return what ends the wait for a run's owner when it is not silent by then, however long its own lease lasts."""
    deadline = time.monotonic() + 2 * _TTL_S

    def check() -> None:
        if time.monotonic() > deadline:
            raise Fenced(f"{uri}: somebody owns this run")

    return check
