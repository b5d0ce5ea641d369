"""The files of a bundle that prediction needs: chosen, fetched once, verified.

A release in S3 is downloaded to a cache folder named after its manifest; a local folder is used in
place. What its manifest names is checked by sha256 each time, so a damaged disk is noticed as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from mmap import ACCESS_READ, mmap
from pathlib import Path, PurePosixPath

from job.errors import NotFound, NoValidCheckpoint, SecurityRefused
from job.store.manifest import Manifest, hash_file
from job.store.release import latest_release, read_release_manifest
from job.store.transfer import download_files
from job.tasks import DECODER, MODEL, list_parts, name_file

_REQUIRED = ("config.json", "tokenizer.json")
_OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


def fetch_bundle(uri: str, cache: Path, precision: str = "auto", allow_http: bool = False) -> Path:
    """Return a local folder with what prediction needs of the bundle at `uri`, verified by sha256.

    `uri` is …/models/<name> (its current release), …/models/<name>/<version> or a bundle folder, in
    S3 or local; `precision` as in `choose_model`. S3 releases come to `cache`/<manifest sha256>.
    Raises NotFound (13) where no bundle lies, NoValidCheckpoint (17) naming a damaged file.
    """
    release = latest_release(uri, allow_http=allow_http)
    if not release.startswith("s3://"):
        return _verify_in_place(Path(release.removeprefix("file://")).expanduser(), precision)
    store, manifest = read_release_manifest(release, allow_http=allow_http)
    _refuse_checkpoint(manifest, release)
    folder = cache / manifest.sha256
    needed = _select_files(manifest.files, precision, release)
    download_files(store, manifest, folder, needed)
    _refuse_hardlinks(folder, needed)
    return folder


def choose_model(names: Collection[str], precision: str, where: str) -> str:
    """Return the ONNX file among `names` that `precision` asks for; raise NotFound (13) with those that exist.

    Of an encoder and a decoder it is the decoder (`list_parts` has both).
    `auto`: the portable int8 where the bundle has one, else fp32. `int8` (or `portable`), `int4` and `fp32` insist; any
    other word is an int8 target (`avx512_vnni` → onnx/model_int8_avx512_vnni.onnx).
    """
    stem = DECODER if any(DECODER in name for name in names) else MODEL
    small = f"onnx/{name_file(stem, 'portable')}"
    meant = {"auto": "portable" if small in names else "fp32", "int8": "portable"}.get(precision, precision)
    wanted = f"onnx/{name_file(stem, meant)}"
    if not all(str(part) in names for part in list_parts(PurePosixPath(wanted))):
        offered = ", ".join(sorted(name for name in names if name.endswith(".onnx"))) or "no ONNX file at all"
        raise NotFound(f"{where}: precision {precision!r} needs {wanted}, but the bundle has {offered}; name another")
    return wanted


def list_bundle(folder: Path) -> list[str]:
    """Return the paths in a bundle folder that can matter here: what lies at its top and in onnx/."""
    return [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("onnx/*"))]


def _select_files(names: Collection[str], precision: str, where: str) -> list[str]:
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        raise NotFound(f"{where}: is no bundle, it has no {missing[0]}; name a release, `job show` lists them")
    model = choose_model(names, precision, where)
    parts = [str(part) for part in list_parts(PurePosixPath(model))]
    return [*_REQUIRED, *parts, *(name for name in (*_OPTIONAL, *(f"{part}_data" for part in parts)) if name in names)]


def _verify_in_place(folder: Path, precision: str) -> Path:
    path = folder / "manifest.json"
    if path.is_file():
        # Not through the store: a Hub snapshot of a release is a folder of symlinks, which a store refuses.
        manifest = Manifest.parse(path.read_bytes(), str(path))
        _refuse_checkpoint(manifest, str(folder))
        needed = _select_files(manifest.files, precision, str(folder))
        for name in needed:
            _verify_file(folder / name, manifest.files[name].size, manifest.files[name].sha256)
    elif (folder / "config.json").is_file():
        needed = _select_files(list_bundle(folder), precision, str(folder))
    else:
        raise NotFound(
            f"{folder}: holds neither manifest.json nor config.json, nor a current.json that names a release; "
            "name a bundle folder, …/models/<name> once a release is promoted, or …/models/<name>/<version>"
        )
    _refuse_hardlinks(folder, needed)
    return folder


def _verify_file(path: Path, size: int, sha256: str) -> None:
    if not path.is_file():
        raise NoValidCheckpoint(f"{path}: named by manifest.json but missing; fetch the release again")
    if path.stat().st_size != size or hash_file(path) != sha256:
        raise NoValidCheckpoint(f"{path}: does not match manifest.json (damaged or edited); fetch the release again")


def _refuse_checkpoint(manifest: Manifest, where: str) -> None:
    if manifest.kind != "release":
        raise NotFound(f"{where}: is a {manifest.kind}, not a release; name …/models/<name> or a bundle folder")


def _refuse_hardlinks(folder: Path, names: Collection[str]) -> None:
    """Raise SecurityRefused (19) for a hard link that a model here could read its weights through.

    ONNX Runtime keeps external data inside the folder of a model, and of what that is a symlink to, by path; a hard
    link is inside by any path. Links that no model names are fine: `cp -l` and the layers of a container make them.
    """
    needed = {folder / name for name in names}
    named = [path for path in needed if path.suffix == ".onnx" and path.is_file()]
    models = {*named, *(path.resolve() for path in named)}
    homes = {model.parent for model in models}
    for path in (path for home in homes for path in home.rglob("*") if path.is_file() and path.stat().st_nlink != 1):
        if path not in models and (path in needed or any(_names_file(model, path.name) for model in models)):
            raise SecurityRefused(f"{path}: is hard-linked elsewhere; refused, name a copy of the bundle")


def _names_file(model: Path, name: str) -> bool:
    """Tell whether an ONNX file may name a file of external data: protobuf writes a path as it is, its length before.

    The name is the path, or stands behind the last / in it.
    """
    if model.stat().st_size == 0:
        return False
    encoded = os.fsencode(name)
    before = b"(?:/|" + re.escape(bytes([len(encoded)])) + b")" if len(encoded) < 128 else b""
    with model.open("rb") as file:
        return re.search(before + re.escape(encoded), mmap(file.fileno(), 0, access=ACCESS_READ)) is not None
