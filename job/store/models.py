"""Model folders: where a model comes from, and what is refused before anything loads it.

A config can name code to run (`auto_map`) or a kernel to fetch (CVE-2026-4372), and pickle weights
run code when they are read. None of that reaches `from_pretrained`.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import DataError, NotFound, SecurityRefused, raise_lack
from job.store.hub import download_snapshot, is_repository, list_files, resolve_commit
from job.store.objects import open_store
from job.store.release import latest_release, read_release_manifest
from job.store.transfer import download_files, mirror_objects

_HOSTILE_KEY = re.compile(r"auto_map|trust_remote_code|_attn_implementation.*|.*_internal|custom_pipelines")
_HARMLESS_KEY = "_attn_implementation_autoset"  # a flag that transformers 4.46–4.56 wrote into every config
_FP32_ONLY = ("deberta",)
"""Kinds that write a number of fp32 into a mask of bf16 (transformers#35332); deberta-v2 does not."""
_NO_HEADER = (
    ArithmeticError, AttributeError, IsADirectoryError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
    struct.error,
)  # fmt: skip
"""What comes of reading one where there is none."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack")
_MAX_CONFIG_BYTES = 64 << 20


@dataclass(frozen=True)
class ModelSource:
    """A resolved model: `path` is local; `origin` is what the recipe named; `commit` is the Hub's, or None.

    `release` is the URI of the release that it is, or None.
    """

    origin: str
    path: Path
    commit: str | None
    release: str | None = None


def fetch_model(origin: str, revision: str, cache: Path, *, allow_http: bool = False) -> ModelSource:
    """Bring a model to this node and refuse (19) a folder that could run code.

    `origin` is a folder, local or `s3://…`, or …/models/<name> whose current release is followed, or a
    Hub id whose `revision` is resolved to a commit first.
    """
    if origin.startswith("s3://"):
        source = _fetch_from_store(origin, cache, allow_http)
    elif Path(origin).is_dir():
        folder = Path(latest_release(origin)).absolute()
        released = (folder / "manifest.json").is_file()
        source = ModelSource(origin, folder, None, str(folder) if released else None)
    elif is_repository(origin):
        commit = resolve_commit(origin, "model", revision)
        refuse_pickles(list_files(origin, "model", commit), origin)
        source = ModelSource(origin, download_snapshot(origin, "model", commit, cache / "hub"), commit)
    elif os.path.isfile(origin):
        raise NotFound(f"model.id: {origin!r} is a file; name the folder that it lies in")
    else:
        raise NotFound(
            f"model.id: folder {origin!r} does not exist; correct the path (`make assets` fetches the quickstart's)"
        )
    inspect_model_folder(source.path, origin)
    return source


def inspect_model_folder(folder: Path, origin: str) -> None:
    """Raise NotFound (13) for a folder that is no model, SecurityRefused (19) for one that could run code.

    Damaged weights, and what is neither file nor folder, are DataError (11).
    """
    if not (folder / "config.json").is_file():
        raise NotFound(f"model.id: {origin!r} holds no config.json; name a folder in the Hugging Face layout")
    _refuse_endless(folder, origin)
    if (folder / "adapter_config.json").exists():
        raise SecurityRefused(
            f"model.id: {origin!r} has adapter_config.json, which makes transformers load another model than "
            "this; refused. Merge the adapter into that model first"
        )
    for path in sorted(folder.glob("*config*.json")):
        for key in _walk_keys(_read_json(path, origin)):
            if _HOSTILE_KEY.fullmatch(key) and key != _HARMLESS_KEY:
                raise SecurityRefused(
                    f"model.id: {origin!r}: {path.name} has the key {key!r}, which can run foreign code; refused. "
                    "Use a model that transformers knows itself"
                )
    refuse_pickles([path.name for path in folder.iterdir()], origin)
    _refuse_missing_shards(folder, origin)
    count_parameters(folder)


def _refuse_endless(folder: Path, origin: str) -> None:
    """Raise for a pipe or a device, which whoever opens it waits for, or reads without end."""
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DataError(f"model.id: {origin!r}: {path.name} is a pipe or a device; remove it")


def _refuse_missing_shards(folder: Path, origin: str) -> None:
    """Raise for weights in several files of which one is not there, as after a copy that was cut short."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():  # which transformers prefers
        return
    places = _read_json(index, origin).get("weight_map")
    for name in sorted(set(map(str, places.values()))) if isinstance(places, dict) else ():
        if not (folder / name).is_file():
            raise DataError(f"model.id: {origin!r}: {name}, which {index.name} names, is not there; fetch it again")


def refuse_pickles(names: list[str], origin: str) -> None:
    """Raise unless `names` has safetensors weights: SecurityRefused (19) for pickles, NotFound (13) for none."""
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise SecurityRefused(
            f"model.id: {origin!r} has pickle weights only ({pickles[0]}), which run code when read; refused. "
            "Convert them to model.safetensors on a machine you can lose"
        )
    raise NotFound(f"model.id: {origin!r} holds no model.safetensors; name a folder with weights")


def _fetch_from_store(origin: str, cache: Path, allow_http: bool) -> ModelSource:
    """Download a release (verified by its manifest) or a plain folder of objects."""
    uri = latest_release(origin, allow_http=allow_http)
    objects = open_store(uri, allow_http=allow_http)
    if objects.read("manifest.json"):
        store, manifest = read_release_manifest(uri, allow_http=allow_http)
        release = cache / "models" / manifest.sha256
        download_files(store, manifest, release, [path for path in manifest.files if "/" not in path])
        return ModelSource(origin, release, None, uri)
    folder = mirror_objects(objects, "", lambda key: "/" not in key, cache / "models")
    if folder is None:
        raise NotFound(f"model.id: nothing lies under {uri}; check the address with `job show`")
    return ModelSource(origin, folder, None)


def needs_fp32(folder: Path) -> bool:
    """Tell whether transformers cannot compute a model of this kind in mixed precision."""
    return read_config(folder).get("model_type") in _FP32_ONLY


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's config.json."""
    return _read_json(folder / "config.json", str(folder))


def _read_json(path: Path, origin: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
        value = json.loads(text.decode()) if len(text) <= _MAX_CONFIG_BYTES else None
    except (ValueError, OSError, RecursionError) as error:
        raise_lack(error)
        value = None
    if not isinstance(value, dict):
        raise DataError(f"model.id: {origin!r}: {path.name} is not a JSON object; restore the file")
    return value


def _walk_keys(value: Any) -> Iterator[str]:
    """Yield every key of nested objects, except vocabularies, whose keys are tokens."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            if key not in ("vocab", "label2id", "added_tokens_decoder"):
                yield from _walk_keys(inner)
    elif isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        for inner in value[:1000]:
            yield from _walk_keys(inner)


def count_parameters(folder: Path) -> int:
    """Return the number of weights in a folder's safetensors, read from their headers alone."""
    return sum(_count_file(path) for path in folder.glob("*.safetensors"))


def _count_file(path: Path) -> int:
    """Return the weights of one file; raise DataError (11) when header and size do not fit each other."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
        tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
        whole = 8 + length + max(tensor["data_offsets"][1] for tensor in tensors) == path.stat().st_size
        count = sum(math.prod(tensor["shape"]) for tensor in tensors)
    except _NO_HEADER:
        whole, count = False, 0
    if not whole:
        raise DataError(f"model.id: {path} is not a whole safetensors file (damaged or cut short); fetch it again")
    return count
