"""What lies under a store, for `job show` and `job verify`; reads only, decides nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.errors import NotFound
from job.store.commit import latest_release, read_release_manifest
from job.store.objects import Store, open_store
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
    models = sorted(
        {tuple(key.split("/")[1:3]) for key in keys if key.startswith("models/") and key.endswith("/manifest.json")}
    )
    if not runs and not models:
        raise NotFound(f"{uri}: neither runs nor releases lie there; check the address (store.uri of the recipe)")
    yield "runs", ["run", "phase", "checkpoint", "MiB"], [_describe_run(store, run, keys) for run in runs]
    yield (
        "releases",
        ["model", "version", "current", "MiB"],
        [_describe_release(store, name, version, keys) for name, version in models],
    )


def verify_uri(uri: str, scratch: Path, *, allow_http: bool = False) -> tuple[int, list[str]]:
    """Return how many objects a release or checkpoint has, and one sentence for each that does not match."""
    release = latest_release(uri.rstrip("/"), allow_http=allow_http)
    store, manifest = read_release_manifest(release, allow_http=allow_http)
    problems = []
    if manifest.kind == "release" and not release.endswith(f"-{manifest.sha256[:8]}"):
        problems.append("manifest.json: its sha256 is not the one in the version's name")
    return len(manifest.files), problems + verify_objects(store, manifest, scratch)


def _list_run(store: Store) -> Iterator[Listing]:
    status, pointer = _read(store, "status.json"), _read(store, "current.json")
    yield "run", ["key", "value"], [[key, str(value)] for key, value in status.items()]
    stages = sorted(item.key for item in store.list("stages/"))
    yield "stages", ["committed"], [[key.removeprefix("stages/").removesuffix(".json")] for key in stages]
    rows = [
        [item.key.split("/")[1], "current" if item.key == pointer.get("manifest") else ""]
        for item in sorted(store.list("checkpoints/"), key=lambda item: item.key)
        if item.key.endswith("/manifest.json")
    ]
    yield "checkpoints", ["checkpoint", ""], rows


def _describe_run(store: Store, run: str, keys: dict[str, int]) -> list[str]:
    status, pointer = _read(store, f"runs/{run}/status.json"), _read(store, f"runs/{run}/current.json")
    size = sum(size for key, size in keys.items() if key.startswith(f"runs/{run}/"))
    step = f"step {pointer['step']}" if pointer else "none"
    return [run, str(status.get("phase", "unknown")), step, str(size >> 20)]


def _describe_release(store: Store, name: str, version: str, keys: dict[str, int]) -> list[str]:
    current = _read(store, f"models/{name}/current.json").get("version")
    size = sum(size for key, size in keys.items() if key.startswith(f"models/{name}/{version}/"))
    return [name, version, "current" if version == current else "", str(size >> 20)]


def _read(store: Store, key: str) -> dict[str, Any]:
    blob = store.read(key)
    try:
        value = json.loads(blob.data) if blob else {}
    except ValueError:
        value = {"phase": "damaged"}
    return value if isinstance(value, dict) else {}
