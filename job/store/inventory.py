"""What lies under a store, for `job show` and `job verify`; reads only, decides nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from job.errors import PERMANENT, JobError, NotFound, NoValidCheckpoint
from job.store.commit import read_pointer
from job.store.manifest import Manifest
from job.store.objects import Store, open_store, split_uri
from job.store.promotion import ModelPointer
from job.store.records import dig, parse
from job.store.release import latest_release, read_release_manifest
from job.store.restore import list_manifests, list_older, read_manifest
from job.store.transfer import verify_objects

Listing = tuple[str, list[str], list[list[str]]]


def list_inventory(uri: str, *, allow_http: bool = False) -> Iterator[Listing]:
    """Yield (title, headings, rows) for a store, a run or a model; raise NotFound when nothing lies there."""
    store = open_store(uri.rstrip("/"), allow_http=allow_http)
    if store.read("run.json"):
        yield from _list_run(store)
        return
    keys = {item.key: item.size for item in store.list("")}
    runs = sorted({key.split("/")[1] for key in keys if key.startswith("runs/") and key.count("/") > 1})
    parts = [key.split("/") for key in keys if key.startswith("models/") and key.endswith("/manifest.json")]
    models = sorted((each[1], each[2]) for each in parts if len(each) == 4)
    if not runs and not models:
        if "manifest.json" in keys:
            raise NotFound(
                f"{uri}: is a single release or checkpoint; `job verify` takes it, and `job show` the store, a run "
                "or …/models/<name>"
            )
        if uri.rstrip("/").split("/")[-2:-1] == ["models"] and any(key.endswith("/manifest.json") for key in keys):
            yield list_versions(uri, allow_http=allow_http)
            return
        raise NotFound(f"{uri}: neither runs nor releases lie there; check the address (store.uri of the recipe)")
    yield "runs", ["run", "phase", "checkpoint", "MiB"], [_describe_run(store, run, keys) for run in runs]
    yield (
        "releases",
        ["model", "version", "current", "MiB", "made of"],
        [_describe_release(store, name, version, keys) for name, version in models],
    )


def list_versions(uri: str, *, allow_http: bool = False) -> Listing:
    """Return (title, headings, rows) of the releases of one model; raise NotFound when it has none."""
    store = open_store(uri.rstrip("/"), allow_http=allow_http)
    sizes: dict[str, int] = {}
    for item in store.list(""):
        version = item.key.partition("/")[0]
        sizes[version] = sizes.get(version, 0) + item.size
    versions = [version for version in sorted(sizes) if store.read(f"{version}/manifest.json")]
    if not versions:
        raise NotFound(
            f"{uri}: no release of a model lies there; name …/models/<name>, `job show` of the store lists them"
        )
    standing = ModelPointer(store).read()
    marks = {version: f"before, {number}" for number, version in reversed([*enumerate(standing.before, 1)])}
    marks |= {standing.version: "current"} if standing.version else {}
    rows = [[version, marks.get(version, ""), str(sizes[version] >> 20)] for version in versions]
    return f"releases of {uri}; {standing.why.get('reason', '')}", ["version", "current", "MiB"], rows


def verify_uri(uri: str, scratch: Path, *, allow_http: bool = False) -> tuple[int, list[str]]:
    """Return how many objects a release or checkpoint has, and one sentence for each that does not match.

    A run stands for its checkpoints, each of which is verified.
    """
    if split_uri(split_uri(uri)[0])[1] == "runs":
        return _verify_run(open_store(uri.rstrip("/"), allow_http=allow_http), scratch)
    release = latest_release(uri.rstrip("/"), allow_http=allow_http)
    store, manifest = read_release_manifest(release, allow_http=allow_http)
    problems = []
    if manifest.kind == "release" and _is_version(store.uri, manifest) and store.uri[-9:] != f"-{manifest.sha256[:8]}":
        problems.append("manifest.json: its sha256 is not the one in the version's name")
    return len(manifest.files), problems + verify_objects(store, manifest, scratch)


def _is_version(uri: str, manifest: Manifest) -> bool:
    """Tell whether a release lies in a folder named after its version, not in a copy that has a name of its own."""
    above, name = split_uri(uri)
    own = f"{re.escape(str(manifest.about.get('run_id')))}-[0-9a-f]{{8}}"
    return split_uri(split_uri(above)[0])[1] == "models" or bool(re.fullmatch(own, name))


def _verify_run(store: Store, scratch: Path) -> tuple[int, list[str]]:
    """Verify what current.json names, and every other checkpoint that is listed; NotFound (13) where no run lies."""
    count, problems, keys = 1, [], list_manifests(store)
    try:
        pointer = read_pointer(store)
        named = [pointer, *list_older(pointer)] if pointer else []
    except NoValidCheckpoint as error:
        named, problems = [], [str(error)]
    digests = {entry["manifest"]: entry["manifest_sha256"] for entry in named}
    if not (keys or named or problems):
        raise NotFound(f"{store.uri}: no checkpoint lies there; `job show` of the store lists its runs")
    for key in [*digests, *(key for key in keys if key not in digests)]:
        try:
            manifest = read_manifest(store, key, digests.get(key))
        except NoValidCheckpoint as error:
            problems.append(str(error))
            continue
        count += 1 + len(manifest.files)
        problems += verify_objects(store, manifest, scratch)
    return count, problems


def list_events(uri: str, *, allow_http: bool = False) -> Iterator[Listing]:
    """Yield what every attempt of a run noted, in order of time; raise NotFound where no run lies."""
    store = open_store(uri.rstrip("/"), allow_http=allow_http)
    if not store.read("run.json"):
        raise NotFound(f"{uri}: is no run; name …/runs/<run-id> (`job show` of the store lists them)")
    rows = []
    for item in store.list("attempts/"):
        record, epoch = _read(store, item.key), item.key.removeprefix("attempts/").partition(".")[0].partition("-")[0]
        events = record["events"] if isinstance(record.get("events"), list) else []
        rows += [_describe_event(epoch, event) for event in events if isinstance(event, dict)]
        rows += [[str(record[mark]), epoch, f"attempt {mark}", ""] for mark in ("began", "ended") if mark in record]
    yield "events", ["time (UTC)", "attempt", "event", ""], sorted(rows)


def follow_events(uri: str, *, allow_http: bool = False, pause_s: float = 2.0) -> Iterator[list[str]]:
    """Yield the events of a run as they come, those of the past first, and how far a training is; end when no further
    attempt will follow.

    Raises NotFound where no run lies. The last row tells how the run ended.
    """
    shown: set[tuple[str, ...]] = set()
    seen: list[str] = []
    while True:
        ended = _find_end(open_store(uri.rstrip("/"), allow_http=allow_http))  # before the events: none may be missed
        for _, _, rows in list_events(uri, allow_http=allow_http):
            new = [row for row in rows if tuple(row) not in shown]
            shown.update(map(tuple, new))
            yield from new
        row = _describe_training(_read(open_store(uri.rstrip("/"), allow_http=allow_http), "status.json"))
        if row and row != seen and not ended:
            yield [datetime.now(UTC).isoformat(timespec="milliseconds"), *row]
        seen = row
        if ended:
            yield ended
            return
        time.sleep(pause_s)


def _find_end(store: Store) -> list[str] | None:
    """Return the row that tells how a run ended for good; None while an attempt runs or may follow."""
    epochs = _list_epochs(store)
    record = _read(store, f"attempts/{epochs[-1]}.json") if epochs else {}
    code = record.get("exit_code")
    # no list, which has no hash, and not false, which equals 0
    if record.get("retried") or type(code) is not int or code not in PERMANENT | {0}:
        return None
    reason = str(record.get("reason", ""))
    return [str(record.get("ended")), str(epochs[-1]), f"run ended with exit code {code}", reason]


def _describe_event(epoch: str, event: dict[str, Any]) -> list[str]:
    details = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("at", "event"))
    return [str(event.get("at")), epoch, str(event.get("event")), details]


def _list_run(store: Store) -> Iterator[Listing]:
    status = _read(store, "status.json")
    status |= {"progress": _describe_progress(status["progress"])} if "progress" in status else {}
    yield "run", ["key", "value"], [[key, str(value)] for key, value in status.items()]
    yield "made of", ["", "", "commit", "sha256"], _describe_sources(dig(_read(store, "run.json"), "identity"))
    owner = _read(store, "owner.json")
    shown = ("epoch", "host", "pid", "seq", "released")
    yield "lease", ["key", "value"], [[key, str(owner[key])] for key in shown if key in owner]
    yield "attempts", ["attempt", "host", "began", "ended", "code", "reason"], list(_describe_attempts(store))
    stages = sorted(item.key for item in store.list("stages/"))
    yield "stages", ["committed"], [[key.removeprefix("stages/").removesuffix(".json")] for key in stages]
    yield "checkpoints", ["checkpoint", "", "MiB"], _describe_checkpoints(store)


def _describe_sources(identity: Any) -> list[list[str]]:
    """Return a row for the model and one for the data that a run began with."""
    names = (("model", "id", "sha256"), ("data", "source", "fingerprint"))
    return [
        [kind, *(str(dig(identity, kind, key) or "") for key in (name, "commit", digest))]
        for kind, name, digest in names
    ]


def _describe_training(status: dict[str, Any]) -> list[str]:
    """Return attempt, phase and progress of a run that trains, else nothing."""
    if "progress" not in status:
        return []
    return [str(status.get("epoch")), str(status.get("phase")), _describe_progress(status["progress"])]


def _describe_progress(progress: Any) -> str:
    """Say how far a training is: step 20/57, 35 %, 0:12 left, loss 0.42, …; what is no progress as it is."""
    try:
        known = {key: progress[key] for key in ("step", "steps", "percent", "left_s")}
        words = [
            f"step {known['step']}/{known['steps']}",
            f"{known['percent']} %",
            f"{timedelta(seconds=known['left_s'])} left",
        ]
        return ", ".join([*words, *(f"{key} {value:.6g}" for key, value in progress.items() if key not in known)])
    except (TypeError, KeyError, ValueError, OverflowError):
        return str(progress)


def _describe_attempts(store: Store) -> Iterator[list[str]]:
    """Yield a row for each attempt, oldest first; one without an end runs, or was killed without a word."""
    for epoch in _list_epochs(store):
        record = _read(store, f"attempts/{epoch}.json")
        yield [str(epoch), *(str(record.get(key, "")) for key in ("host", "began", "ended", "exit_code", "reason"))]


def _list_epochs(store: Store) -> list[int]:
    names = (item.key.removeprefix("attempts/") for item in store.list("attempts/"))
    return sorted(int(name.removesuffix(".json")) for name in names if re.fullmatch(r"\d+\.json", name))


def _describe_checkpoints(store: Store) -> list[list[str]]:
    current, rows = _read(store, "current.json").get("manifest"), []
    for key in reversed(list_manifests(store)):
        try:
            size = str(read_manifest(store, key).total_bytes >> 20)
        except JobError:
            size = "damaged"
        rows.append([key.split("/")[1], "current" if key == current else "", size])
    return rows


def _describe_run(store: Store, run: str, keys: dict[str, int]) -> list[str]:
    status, pointer = _read(store, f"runs/{run}/status.json"), _read(store, f"runs/{run}/current.json")
    size = sum(size for key, size in keys.items() if key.startswith(f"runs/{run}/"))
    step = f"step {pointer.get('step')}" if pointer.get("manifest") else "none"
    return [run, str(status.get("phase", "unknown")), step, str(size >> 20)]


def _describe_release(store: Store, name: str, version: str, keys: dict[str, int]) -> list[str]:
    current = _read(store, f"models/{name}/current.json").get("version")
    size = sum(size for key, size in keys.items() if key.startswith(f"models/{name}/{version}/"))
    about = dig(_read(store, f"models/{name}/{version}/manifest.json"), "about")
    origin = dig(about, "parent") or dig(about, "model", "id") or ""
    return [name, version, "current" if version == current else "", str(size >> 20), str(origin)]


def _read(store: Store, key: str) -> dict[str, Any]:
    blob = store.read(key)
    try:
        return parse(blob, key) if blob else {}
    except NoValidCheckpoint:
        return {"phase": "damaged"}
