"""A manifest names every file of a checkpoint or release with size and sha256; it is written last.

What a manifest does not name does not exist for a reader; what it names is verified before use.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from io import RawIOBase
from pathlib import Path
from typing import Any

from job.errors import NoValidCheckpoint
from job.store.objects import check_key
from job.store.records import dump, dump_sealed, has_seal

_MAX_FILES = 100_000
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class ManifestEntry:
    """One file: size in bytes, sha256 in hex, and the key it lies under (relative to the store)."""

    size: int
    sha256: str
    key: str


@dataclass(frozen=True)
class Manifest:
    """`files` maps a path inside the set to its entry, `about` says which set it is; neither is changed."""

    kind: str
    files: dict[str, ManifestEntry]
    about: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the JSON that is stored, sealed: a flipped bit in it is known as damage (`records.seal`)."""
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        files = {path: vars(entry) for path, entry in self.files.items()}
        return dump_sealed({"kind": self.kind, "files": files, "about": self.about})

    @cached_property
    def sha256(self) -> str:
        """Digest (hex) of the stored JSON."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Sum of the sizes of all files."""
        return sum(entry.size for entry in self.files.values())

    @staticmethod
    def parse(data: bytes, where: str, sha256: str | None = None) -> Manifest:
        """Read a stored manifest; NoValidCheckpoint (17) when damaged, SecurityRefused (19) on hostile paths.

        `sha256` (hex) is the digest by which a pointer names it; without one its own seal must hold.
        """
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise NoValidCheckpoint(f"{where}: is not what the pointer names (damaged); pick another version")
        try:
            raw = json.loads(data)
            whole = sha256 is not None or has_seal(raw)
            entries = {str(path): ManifestEntry(**entry) for path, entry in raw["files"].items()}
            manifest = Manifest(str(raw["kind"]), entries, dict(raw["about"]))
            whole = whole and all(is_whole(entry) for entry in entries.values()) and 0 < len(entries) <= _MAX_FILES
            whole = whole and not any(parent in entries for path in entries for parent in _parents(path))
            if sha256 is None:
                manifest.to_bytes()  # nesting that can be read but not written would fail later
            else:
                dump(manifest.about)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise NoValidCheckpoint(f"{where}: not a manifest (damaged or cut short); pick another version")
        for path, entry in manifest.files.items():
            check_key(path)
            check_key(entry.key)
        if sha256 is not None:
            vars(manifest)["_bytes"] = data  # it is named by them: they need not be made again
        elif data != manifest.to_bytes():  # its digest is taken over these bytes, not over the seal
            raise NoValidCheckpoint(f"{where}: was changed after it was written; pick another version")
        return manifest


def is_whole(entry: ManifestEntry) -> bool:
    """Tell whether an entry that was read has what was written into it: a size, a sha256 in hex, a key."""
    digest_ok = isinstance(entry.sha256, str) and len(entry.sha256) == 64
    return digest_ok and type(entry.size) is int and entry.size >= 0 and isinstance(entry.key, str)


def _parents(path: str) -> list[str]:
    """Return the folders above a path, which cannot be files of the same set."""
    return [path[:end] for end, character in enumerate(path) if character == "/"]


def describe_files(folder: Path, paths: Iterable[str], prefix: str) -> dict[str, ManifestEntry]:
    """Hash files of `folder`; return path → entry whose key is `prefix`/path, the path alone without a prefix."""
    return {path: _describe_file(f"{folder}/{path}", os.path.join(prefix, path)) for path in sorted(paths)}


def _describe_file(path: str, key: str) -> ManifestEntry:
    return ManifestEntry(os.path.getsize(path), hash_file(path), key)


def hash_file(path: str | Path) -> str:
    """Return the sha256 (hex) of a file."""
    with open(path, "rb", buffering=0) as file:
        return hash_stream(file)


def keep_digests(folder: Path, record: Path) -> None:
    """Write the sha256 of all files below `folder` into `record`, for `match_digests`."""
    digests = {path: hash_file(folder / path) for path in list_files(folder)}
    record.write_text(json.dumps(digests), encoding="utf-8")


def match_digests(folder: Path, record: Path) -> bool:
    """Tell whether files lie in `folder` as they were written: a power cut leaves some empty, or full of zeros."""
    try:
        digests = json.loads(record.read_text(encoding="utf-8"))
        return all(hash_file(folder / path) == digest for path, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def hash_stream(stream: RawIOBase) -> str:
    """Return the sha256 (hex) of what a stream gives, read in chunks."""
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def list_files(folder: Path) -> list[str]:
    """Return the paths (posix, relative) of all regular files below `folder`, sorted."""
    found = (os.path.join(place, name) for place, _, names in os.walk(folder, onerror=_refuse) for name in names)
    begin = len(os.path.join(folder, ""))
    return sorted(path[begin:] for path in found if os.path.isfile(path))


def _refuse(error: OSError) -> None:
    """Raise what keeps a folder from being read: its files must not be left out in silence."""
    if not isinstance(error, FileNotFoundError):
        raise error
