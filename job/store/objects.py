"""The object protocol that every store implements, and the rules for keys and URIs.

A key is relative to the store's URI. Conditional writes are part of the protocol because every
commit hangs on them; listing is for showing and for proof of absence, never for correctness.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from job.errors import JobError, NotFound, SecurityRefused, contains_secret, redact

if TYPE_CHECKING:
    from job.recipe.schema import Store as Address  # pydantic takes time that `job predict` has not
    from job.store.held import HeldFile  # which is made of what this file and the manifest say

MAX_KEY_LENGTH = 512
MAX_PART_LENGTH = 200
MAX_KEY_DEPTH = 8
MAX_READ_BYTES = 64 << 20
"""More than any record has, a manifest of 100,000 files included: what must fit into memory is capped beforehand."""


class PreconditionFailed(JobError):
    """A conditional write found another object (or none) than the caller expected."""


class SizeDiffers(JobError):
    """An object has another size than the caller was told."""


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object: key relative to the store, size in bytes, when it was written (seconds since 1970, by the
    store's clock), ETag. Where listing does not give them they are 0 and "".
    """

    key: str
    size: int
    modified: float
    etag: str = ""


@dataclass(frozen=True)
class Blob:
    """A small object in memory, with the ETag that a conditional write can name."""

    data: bytes
    etag: str


class Store(Protocol):
    """A place for objects. All keys are relative and pass `check_key`.

    Every method may raise AccessDenied (12), NotFound (13, also for a missing bucket) or
    Unreachable (77); a missing object is None where the return type says so.
    """

    uri: str

    def read(self, key: str) -> Blob | None:
        """Return a small object, or None where it is proven absent; SecurityRefused (19) above MAX_READ_BYTES."""

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write a small object and return its ETag; raise PreconditionFailed when the condition fails."""

    def upload(self, source: Path | HeldFile, key: str) -> None:
        """Copy a local file of any size to `key`, or one in memory."""

    def download(self, key: str, path: Path, *, size: int | None = None) -> None:
        """Copy the object to a new local file; raise NotFound when it is absent.

        Where `size` (bytes) is given and the object has another, SizeDiffers is raised and nothing is copied.
        """

    def list(self, prefix: str, *, every: bool = False) -> Iterator[ObjectInfo]:
        """Yield the objects whose key starts with `prefix`, in no promised order.

        Those whose key does not pass `check_key` are passed over unless `every` is asked for: nobody here wrote them,
        and no call could name them. Consoles mark a folder by an empty object `folder/`.
        """

    def list_folders(self, prefix: str) -> Iterator[str]:
        """Yield every `prefix`…/ under which objects lie, without listing those; `prefix` is empty or ends with "/".

        A server may go on naming one that is empty by now.
        """

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; absent ones are no error."""

    def sweep(self, wanted: Callable[[str], bool] = lambda key: True) -> int:
        """Abort the uploads below this store's URI that were begun and never finished; return how many.

        `wanted` is asked with the key that an upload was to fill.
        """


def open_store(uri: str, *, allow_http: bool = False, single_writer: bool = False) -> Store:
    """Return the store behind `s3://bucket/prefix`, `file:///folder` or a local path.

    Nothing is asked of the network yet; see `Store.list` for a first contact. With `single_writer` the
    conditions of a write are checked by reading first, for servers that know none: unsafe with two writers.
    Raises SecurityRefused (19) for an address that carries a credential, NotFound (13) for another scheme.
    """
    if contains_secret(uri):
        raise SecurityRefused(
            f"{redact(uri)}: the address holds a credential; remove it (and revoke it if it was shared), and give "
            "credentials by environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
        )
    if uri.startswith("s3://"):
        from job.store.s3 import S3Store  # boto3 costs 0.3 s, which a local folder need not pay

        return S3Store(uri, allow_http=allow_http, single_writer=single_writer)
    if "://" in uri.removeprefix("file://") or uri.startswith("s3:"):
        raise NotFound(f"{uri}: is no store; write s3://bucket/prefix, file:///folder or a local path")
    from job.store.folder import FolderStore

    try:
        return FolderStore(Path(uri.removeprefix("file://")).expanduser())
    except RuntimeError:
        raise NotFound(f"{uri}: there is no such home folder; write the folder's full path") from None


def open_room(address: Address, room: str = "") -> Store:
    """Return the store that a recipe names, or what lies below `room` in it: `models/<name>`, say."""
    uri = f"{address.uri}/{room}" if room else address.uri
    return open_store(uri, allow_http=address.allow_http, single_writer=address.single_writer)


def split_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/a/b` into ("s3://bucket/a", "b") and a path alike; `b` is the last part."""
    parent, _, last = uri.rstrip("/").rpartition("/")
    return parent, last


def check_key(key: str) -> str:
    """Return `key` if it is a plain relative posix path, else raise SecurityRefused (19)."""
    if not is_plain(key):
        raise SecurityRefused(f"key {key[:80]!r} is not a plain relative path; refused, nothing was written")
    return key


def is_plain(key: str) -> bool:
    """Tell whether `key` is a plain relative posix path, neither too long nor too deep."""
    parts = key.split("/")
    # Lone surrogates (from JSON escapes) are no file name; other bytes of a file name fit in 255 with a suffix.
    hostile = re.search(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]", key) or any(part in ("", ".", "..") for part in parts)
    return not (hostile or len(parts) > MAX_KEY_DEPTH or _too_long(key, parts))


def check_read_size(uri: str, key: str, size: int) -> None:
    """Raise SecurityRefused (19) for an object that is no record: `size` in bytes."""
    if size > MAX_READ_BYTES:
        raise SecurityRefused(
            f"{uri}/{key}: has {size >> 20} MiB, where a record has at most {MAX_READ_BYTES >> 20}; refused, nothing "
            "was downloaded: find out who wrote it, then delete it"
        )


def check_prefix(prefix: str) -> str:
    """Return `prefix` if keys can start with it (it may be empty or end anywhere), else raise SecurityRefused (19)."""
    folder = prefix.rpartition("/")[0]
    if folder or prefix.startswith("/"):
        check_key(folder)
    return prefix


def _too_long(key: str, parts: Sequence[str]) -> bool:
    return len(key.encode()) > MAX_KEY_LENGTH or any(len(part.encode()) > MAX_PART_LENGTH for part in parts)


def check_endpoint(endpoint: str | None, allow_http: bool) -> None:
    """Refuse (19) an endpoint that would carry credentials in clear text to another machine."""
    endpoint = endpoint or "https://"
    if not (allow_http or is_safe(endpoint)):
        parts = urlsplit(endpoint)
        raise SecurityRefused(
            f"endpoint {parts.scheme}://{parts.hostname} is not https; use https, or set store.allow_http: true "
            "where the network is trusted"
        )


def is_safe(endpoint: str) -> bool:
    """Tell whether credentials may be sent there: by TLS, or to this machine."""
    parts = urlsplit(endpoint)
    return parts.scheme == "https" or _is_loopback(parts.hostname or "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
