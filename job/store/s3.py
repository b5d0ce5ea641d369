"""S3-compatible storage through boto3, the only place that imports it.

Credentials, region, endpoint, proxy and CA come from the standard variables and files. Options
follow what custom servers accept: see `_list_options`. Every botocore error becomes a JobError.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.session
from boto3.exceptions import Boto3Error, RetriesExceededError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)
from botocore.utils import get_environ_proxies, parse_timestamp
from urllib3.exceptions import HTTPError

from job import __version__
from job.errors import AccessDenied, JobError, NotFound, RecipeError, Unreachable
from job.store.held import HeldFile
from job.store.objects import (
    Blob,
    ObjectInfo,
    PreconditionFailed,
    SizeDiffers,
    check_endpoint,
    check_key,
    check_prefix,
    check_read_size,
    is_plain,
    is_safe,
)
from job.store.parallel import LARGE_AT_A_TIME, SMALL_AT_A_TIME, run_parallel

log = logging.getLogger("job.store")

Result = TypeVar("Result")

PART_SIZE_MIB = 16
_CONCURRENCY, _AWS_CONCURRENCY = 4, 8
"""Connections for one file. AWS gives each a tenth of a gigabyte a second; near a server more only cost processor."""
_READ_BYTES = 1 << 20
"""What a download writes at once."""
_ONE_REQUEST_BYTES = 1 << 20
"""A file of so many bytes goes as it is: what s3transfer plans of threads and parts costs more than the request."""
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
DEADLINE_S = 60.0
"""How long one call goes on retrying before Unreachable (77)."""
_LONGEST_PAUSE_S = 4.0
_SILENT_S = 5.0
"""How long a call fails before it says that it goes on trying."""
_USER_AGENT = f"finetune-job/{__version__} boto3/{boto3.__version__}"
"""For the store's log; botocore would put one of its own together for every request."""

_ABSENT = {"NoSuchKey", "404", "NotFound"}
_DENIED = {
    "AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken",
    "InvalidToken", "RequestTimeTooSkewed", "AllAccessDisabled", "Unauthorized", "401",
}  # fmt: skip
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
_FAILED_CONDITION = {"PreconditionFailed", "412"}
_AGAIN = {
    "SlowDown", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted", "NoSuchUpload",
    "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",  # other bytes came than were sent
    "InternalError", "ServiceUnavailable",  # of one key of many, without a status
    "Throttling", "IDPCommunicationError",  # of who gives out the credentials of a role, which says 400
}  # fmt: skip
_TYPES = {".html": "text/html; charset=utf-8", ".png": "image/png", ".json": "application/json"}
"""What a browser must know to show an object instead of saving it."""
_PROOFS = {
    "PutObject": "ETag", "UploadPart": "ETag", "CreateMultipartUpload": "UploadId", "CompleteMultipartUpload": "ETag",
}  # fmt: skip
"""What each step of an upload answers where it was done."""
_NO_BULK_DELETE = (400, 405, 501)
"""How servers answer that lack the call, or that want the MD5 which boto3 no longer sends with it (since 1.36)."""


class NotS3(BotoCoreError):
    """A success lacks what every S3 server says with it: something else answered, a portal or a gateway."""

    fmt = "the answer is a success but has no {name}"


_TRANSIENT = (
    ConnectTimeoutError, EndpointConnectionError, HTTPClientError, HTTPError, IncompleteReadError, NotS3,
    ReadTimeoutError, ResponseStreamingError,
)  # fmt: skip
"""HTTPError is urllib3's: botocore lets it through where TLS breaks in the middle of a body."""
_WRONG_TLS = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")
"""What stays so: a certificate that nobody here trusts, a server that speaks no TLS. Else TLS breaks as a network."""


_Begun = tuple[Any, bytes]
"""An open answer, and the first piece that was read of it."""


class _Source(NamedTuple):
    """An object of `size` bytes that is downloaded, and what every request for it says."""

    key: str
    size: int
    asked: dict[str, str]

    @property
    def what(self) -> str:
        """What is done to it, for messages."""
        return f"download {self.key}"

    def ask(self, place: int, end: int) -> dict[str, str]:
        """Return the request for what lies from `place` to before `end`: a range, unless that is all of it."""
        whole = end - place == self.size
        return self.asked if whole else self.asked | {"Range": f"bytes={place}-{end - 1}"}


class S3Store:
    """A bucket and prefix; see `job.store.objects.Store` for the methods."""

    def __init__(self, uri: str, *, allow_http: bool = False, single_writer: bool = False) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self.uri = uri.rstrip("/")
        self.bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._allow_http, self._single_writer = allow_http, single_writer
        self._connecting = Lock()
        self._connect()
        self._worked = False

    def _connect(self) -> None:
        """Two clients: `_call` alone retries a small call and knows its deadline; a transfer retries each part."""
        _check_ca_bundle()
        with _explain_settings():
            core = botocore.session.Session()
            core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_time)
            session = boto3.session.Session(botocore_session=core)  # one: it keeps what it has read of S3's description
            endpoint = session.client("s3").meta.endpoint_url
            _check_address(endpoint)
            check_endpoint(endpoint, self._allow_http)
            client = _make_client(session, _list_options(endpoint, attempts=1))
            client.meta.events.register_last("before-call.s3", _ask_nothing_first)
            options = _list_options(endpoint, attempts=5)
            if _is_protected(endpoint) and "payload_signing_enabled" not in core.get_scoped_config().get("s3", {}):
                options.setdefault("s3", {})["payload_signing_enabled"] = False
            self._mover = _make_client(session, options)
            self._mover.meta.events.register("after-call.s3", _demand_proof)
        self._client = client
        self._transfer = TransferConfig(
            multipart_threshold=PART_SIZE_MIB << 20,
            multipart_chunksize=PART_SIZE_MIB << 20,
            max_concurrency=_AWS_CONCURRENCY if _is_aws(endpoint) else _CONCURRENCY,
            preferred_transfer_client="classic",
        )
        # of what comes from memory parts are copied: one for each connection, where s3transfer would take ten
        self._transfer.max_in_memory_upload_chunks = self._transfer.max_concurrency

    def _connect_again(self, client: Any) -> None:
        """Connect anew, once for all threads whose `client` was refused; where that fails, all stays as it is."""
        with self._connecting:
            if self._client is client:
                with suppress(JobError):  # of a file, say, that somebody is writing: the next try reads it again
                    self._connect()

    def read(self, key: str) -> Blob | None:
        def get() -> Blob | None:
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=self._full(key))
                check_read_size(self.uri, key, answer.get("ContentLength", 0))
                return Blob(answer["Body"].read(), _demand(answer, "ETag"))
            except ClientError as error:
                if _code(error) in _ABSENT:
                    return None
                raise

        return self._call(f"read {key}", get)

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
        if if_match is not None:
            condition = {"IfMatch": if_match}
        if condition and self._single_writer:
            self._check_condition(key, if_match)
            condition = {}

        def put() -> str:
            try:
                return self._put(self._full(key), data, condition)
            except ClientError as error:
                if if_match is not None and _code(error) == "NoSuchKey":  # AWS' answer where the object is gone
                    raise PreconditionFailed(f"{self.uri}: cannot write {key}: the object is gone") from None
                raise

        return self._call(f"write {key}", put)

    def _put(self, full: str, data: bytes, extra: dict[str, Any]) -> str:
        return str(_demand(self._client.put_object(Bucket=self.bucket, Key=full, Body=data, **extra), "ETag"))

    def _check_condition(self, key: str, if_match: str | None) -> None:
        """Check by reading what the server would check in the write itself; enough where nobody else writes."""
        found = self.read(key)
        if (found.etag if found else None) != if_match:
            raise PreconditionFailed(f"{self.uri}: cannot write {key}: another object is there")

    def upload(self, source: Path | HeldFile, key: str) -> None:
        what, full = f"upload {key}", self._full(key)
        kind = _TYPES.get(Path(key).suffix)
        extra = {"ContentType": kind} if kind else {}
        size = source.size if isinstance(source, HeldFile) else source.stat().st_size
        if size <= _ONE_REQUEST_BYTES:
            with source.open("rb") as file:
                data = file.read()
            self._call(what, partial(self._put, full, data, extra))
            return
        how = {"Bucket": self.bucket, "Key": full, "Config": self._transfer, "ExtraArgs": extra}
        if isinstance(source, HeldFile):
            self._call(what, lambda: self._mover.upload_fileobj(source.open(), **how))
        else:
            self._call(what, lambda: self._mover.upload_file(str(source), **how))

    def download(self, key: str, path: Path, *, size: int | None = None) -> None:
        """Fetch ranges side by side; a thread writes what it reads, where s3transfer's hand it to one that writes."""
        step, (source, begun) = self._transfer.multipart_chunksize, self._open(key, size)
        path.write_bytes(b"")

        def fetch(start: int) -> None:
            part = start, min(start + step, source.size)
            with path.open("r+b") as file:
                file.seek(start)
                for data in self._read_range(source, part, begun if start == 0 else None):
                    file.write(data)

        if source.size <= step:
            fetch(0)
        else:
            run_parallel(self._transfer.max_concurrency, fetch, range(0, source.size, step))

    def _open(self, key: str, size: int | None) -> tuple[_Source, _Begun | None]:
        """Return what to ask for an object, and the answer to the first request where its size was known.

        Who knows the size need not ask for it: that answer tells it, and the ETag.
        """
        begun: _Begun | None = None
        source = _Source(key, size or 0, {"Bucket": self.bucket, "Key": self._full(key)})
        if size is None:
            there, etag = self._call(source.what, partial(self._measure, source))
            source = source._replace(size=there)
        else:
            begun, etag = self._call(source.what, partial(self._begin, source))
        if source.size > self._transfer.multipart_chunksize and etag and not etag.startswith("W/"):
            source = source._replace(asked=source.asked | {"IfMatch": etag})  # so that all ranges are of one object
        return source, begun

    def _begin(self, source: _Source) -> tuple[_Begun, str]:
        """Ask for an object, or its first range, and return what is open then, and the ETag; SizeDiffers as it says."""
        end = min(source.size, self._transfer.multipart_chunksize)
        wanted = source.ask(0, end)
        try:
            answer = self._client.get_object(**wanted)
        except ClientError as error:
            if _status(error) == 416:  # no range begins in an empty object
                self._check_size(source)
            raise
        etag = str(_demand(answer, "ETag"))
        if _tell_size(answer) != str(source.size):
            self._check_size(source)
        return self._take(answer, wanted, end), etag

    def _check_size(self, source: _Source) -> None:
        """Raise SizeDiffers where HEAD too says so: what stands before the server may have changed one answer."""
        there, _ = self._measure(source)
        if there != source.size:
            raise SizeDiffers(f"{self.uri}: {source.key} has {there} bytes instead of {source.size}")

    def _read_range(self, source: _Source, part: tuple[int, int], begun: _Begun | None) -> Iterator[bytes]:
        """Yield what lies from `part[0]` to before `part[1]`, of which `begun` is an open answer.

        Where it breaks off it is asked for anew from there, with a new deadline.
        """
        (place, end), what = part, source.what
        while place < end:
            try:
                body, data = begun or self._call(what, partial(self._begin_range, source.ask(place, end), end - place))
            except PreconditionFailed:
                raise Unreachable(f"{self.uri}: cannot {what}: it changed while it was read; run again") from None
            begun = None
            while data:
                place += len(data)
                yield data
                try:
                    data = body.read(_READ_BYTES)
                except _TRANSIENT:
                    break

    def _begin_range(self, wanted: dict[str, str], count: int) -> _Begun:
        return self._take(self._client.get_object(**wanted), wanted, count)

    def _take(self, answer: dict[str, Any], wanted: dict[str, str], count: int) -> _Begun:
        """Return an open answer and the first piece that is read of it; Unreachable where it is not what was asked."""
        part, given = wanted.get("Range", "").replace("=", " "), answer.get("ContentRange", "").partition("/")[0]
        if answer.get("ContentLength") != count or given != part:
            raise Unreachable(
                f"{self.uri}: {wanted['Key']}: {answer.get('ContentLength')} bytes ({given or 'all'}) came instead of "
                f"{count} ({part or 'all'}); does the server, or what stands before it, know ranges? Run again"
            )
        return answer["Body"], answer["Body"].read(_READ_BYTES)

    def _measure(self, source: _Source) -> tuple[int, str | None]:
        """Return how many bytes an object has, and its ETag."""
        try:
            answer = self._client.head_object(**source.asked)
            return int(_demand(answer, "ContentLength")), answer.get("ETag")
        except ClientError as error:
            if _code(error) in ("400", "403"):  # an answer to HEAD has no body: a GET tells the reason
                self._client.get_object(**source.asked, Range="bytes=0-0")["Body"].close()
            raise

    def list(self, prefix: str, *, every: bool = False) -> Iterator[ObjectInfo]:
        for page in self._list_pages(prefix):
            for item in page.get("Contents", []):
                key, written = item["Key"].removeprefix(self._prefix), item.get("LastModified")
                if every or is_plain(key):
                    yield ObjectInfo(key, item["Size"], written.timestamp() if written else 0.0, item.get("ETag", ""))

    def list_folders(self, prefix: str) -> Iterator[str]:
        for page in self._list_pages(prefix, Delimiter="/"):
            folders = (item["Prefix"].removeprefix(self._prefix) for item in page.get("CommonPrefixes", []))
            yield from (folder for folder in folders if is_plain(folder.removesuffix("/")))

    def delete(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), 1000):
            self._call("delete", partial(self._delete_chunk, [self._full(key) for key in keys[start : start + 1000]]))

    def sweep(self, wanted: Callable[[str], bool] = lambda key: True) -> int:
        uploads = self._call("list unfinished uploads", self._list_uploads)
        uploads = [upload for upload in uploads if wanted(upload["Key"].removeprefix(self._prefix))]
        for upload in uploads:
            target = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            self._call("abort an upload", partial(self._abort, target))
        return len(uploads)

    def _abort(self, target: dict[str, str]) -> None:
        try:
            self._client.abort_multipart_upload(**target)
        except ClientError as error:
            if _code(error) != "NoSuchUpload":  # finished or aborted meanwhile, perhaps by a call whose answer was lost
                raise

    def _list_uploads(self) -> Sequence[dict[str, Any]]:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self._prefix)
        return [upload for page in pages for upload in page.get("Uploads", [])]

    def _delete_chunk(self, keys: Sequence[str]) -> None:
        chunk = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        try:
            errors = self._client.delete_objects(Bucket=self.bucket, Delete=chunk).get("Errors", [])
        except ClientError as error:
            if _status(error) not in _NO_BULK_DELETE:
                raise
            for key in keys:
                self._client.delete_object(Bucket=self.bucket, Key=key)
            return
        for item in errors:  # the call as a whole succeeds even when no key may be deleted
            if item.get("Code") not in _ABSENT:
                raise ClientError({"Error": item}, "DeleteObjects")

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _list_pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        wanted = {"Bucket": self.bucket, "Prefix": self._prefix + check_prefix(prefix)} | options
        while True:
            page = self._call(f"list {prefix}", partial(self._list_page, wanted))
            yield page
            if not page["IsTruncated"]:
                return
            if page["NextContinuationToken"] == wanted.get("ContinuationToken"):
                raise Unreachable(
                    f"{self.uri}: cannot list {prefix}: the server says again to go on at the same place; does a "
                    "cache stand before the store? Take it away, then run again"
                )
            wanted["ContinuationToken"] = page["NextContinuationToken"]

    def _list_page(self, wanted: dict[str, str]) -> dict[str, Any]:
        """Return a page of a listing; what is none must not look like an empty one, which proves absence."""
        page: dict[str, Any] = self._client.list_objects_v2(**wanted)
        if _demand(page, "IsTruncated"):
            _demand(page, "NextContinuationToken")
        for item in page.get("Contents", []):
            _demand(item, "Key")
            _demand(item, "Size")
        for item in page.get("CommonPrefixes", []):
            _demand(item, "Prefix")
        return page

    def _call(self, what: str, request: Callable[[], Result]) -> Result:
        """Make one request, over and over while the store is unreachable, until DEADLINE_S."""
        began, told = time.monotonic(), False
        deadline = began + DEADLINE_S
        pause_s = 0.5
        while True:
            client = self._client
            try:
                result = request()
                self._worked = True
                return result
            except (BotoCoreError, ClientError, Boto3Error, HTTPError) as caught:
                # S3UploadFailedError carries the server's answer only as its context
                answer = caught.__context__ if isinstance(caught, Boto3Error) else None
                error = answer if isinstance(answer, ClientError) else caught
                expired = self._worked and _lacks_credentials(error)
                if not (expired or _is_transient(error)) or time.monotonic() + pause_s > deadline:
                    self._raise(what, error, expired)
                if not told and time.monotonic() > began + _SILENT_S:
                    told, left_s = True, deadline - time.monotonic()
                    why = _code(error) if isinstance(error, ClientError) else type(error).__name__
                    log.warning("%s: cannot %s yet (%s); trying again for %.0f s", self.uri, what, why, left_s)
                if expired:  # new credentials may lie in the environment's files, or come with a new token
                    self._connect_again(client)
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _raise(self, what: str, error: Exception, expired: bool) -> NoReturn:
        if expired:
            raise Unreachable(
                f"{self.uri}: cannot {what}: the credentials expired and no new ones came; run again with new ones"
            ) from None
        raise _translate(error, f"{self.uri}: cannot {what}", self.bucket) from None


def _parse_time(value: Any) -> datetime:
    """Return what botocore's own parser does, which takes longer for the times in a list than all else of it.

    Only the form of those times is read here: digits alone are seconds for botocore, a day for ISO 8601.
    """
    if isinstance(value, str) and value.endswith("Z"):
        with suppress(ValueError):
            return datetime.fromisoformat(value)
    return parse_timestamp(value)


@contextmanager
def _explain_settings() -> Iterator[None]:
    """Turn what boto3 raises for variables and files that it cannot use into JobErrors."""
    try:
        yield
    except ProfileNotFound as error:
        raise AccessDenied(f"AWS_PROFILE: {error}; correct it or unset it") from None
    except (BotoCoreError, ValueError) as error:
        raise RecipeError(
            f"S3 client: {error}; check AWS_ENDPOINT_URL_S3 (https://host or https://host:port) and AWS_REGION"
        ) from None


def _check_address(endpoint: str) -> None:
    """Raise ValueError for an endpoint that boto3 takes, but to which no request can go."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"Invalid endpoint: {endpoint}")


def _make_client(session: boto3.session.Session, options: dict[str, Any]) -> Any:
    client = session.client("s3", config=Config(**options))
    client.meta.events.register("before-call.s3.HeadBucket", _follow_no_redirect)
    return client


def _is_aws(endpoint: str) -> bool:
    return (urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _is_protected(endpoint: str) -> bool:
    """Tell whether what is sent needs no signed digest: TLS guards its way, or it does not leave this machine."""
    return endpoint.startswith("https") or (is_safe(endpoint) and not get_environ_proxies(endpoint))


def _follow_no_redirect(context: dict[str, Any], **_: Any) -> None:
    """Mark a question for a bucket's region as redirected already.

    botocore asks it of a bucket that redirects (S3RegionRedirectorv2), and without the mark asks again when that
    answer redirects too, until the stack is full.
    """
    context["s3_redirect"]["redirected"] = True


def _ask_nothing_first(params: dict[str, Any], **_: Any) -> None:
    """Send a body at once; botocore would ask first whether to, which costs every write a second round trip.

    What goes through this client is small: records, and files of one request.
    """
    params["headers"].pop("Expect", None)


def _list_options(endpoint: str, attempts: int) -> dict[str, Any]:
    """Return a client's options for any server; for one that is not AWS, checksums only where the API demands them.

    Since boto3 1.36 default CRC trailers are refused or misreported by older S3-compatible servers.
    Our own sha256 stands in the manifest anyway; a second one, signed, guards what crosses a network without TLS.
    """
    options: dict[str, Any] = {
        "retries": {"mode": "standard", "total_max_attempts": attempts},
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "tcp_keepalive": True,
        "user_agent": _USER_AGENT,
        # as many as are ever open: what is beyond it would be closed, and made anew for the next request
        "max_pool_connections": max(LARGE_AT_A_TIME * _AWS_CONCURRENCY, SMALL_AT_A_TIME),
    }
    if not _is_aws(endpoint):
        options |= {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    return options


def _check_ca_bundle() -> None:
    bundle = os.environ.get("AWS_CA_BUNDLE")
    if bundle and not Path(bundle).exists():
        raise NotFound(f"AWS_CA_BUNDLE: file {bundle!r} does not exist; correct the variable or unset it")


def _demand(answer: dict[str, Any], name: str) -> Any:
    """Return what an answer says under `name`; raise NotS3 where it says nothing."""
    if answer.get(name) in (None, ""):
        raise NotS3(name=name)
    return answer[name]


def _demand_proof(http_response: Any, parsed: dict[str, Any], model: Any, **_: Any) -> None:
    """Demand of a success in a transfer what `_put` does; s3transfer would take any for an object that is there.

    A multipart upload is completed by an answer that can be a success with nothing, or something else, in it.
    """
    if http_response.status_code < 300 and (name := _PROOFS.get(model.name)):
        _demand(parsed, name)


def _tell_size(answer: dict[str, Any]) -> str:
    """Return how many bytes an object has of which an answer is all or a range, as far as it says."""
    return answer.get("ContentRange", "").rpartition("/")[2] or str(answer.get("ContentLength"))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _lacks_credentials(error: Exception) -> bool:
    """Tell whether credentials that worked have expired, or could not be renewed just now, whatever the reason was."""
    if isinstance(error, ClientError):
        return _code(error) in _EXPIRED or error.operation_name.startswith("AssumeRole")
    return isinstance(error, (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError))


def _is_transient(error: Exception) -> bool:
    if isinstance(error, ClientError):
        again = _status(error) in (409, 429) or (_status(error) >= 500 and not _is_missing(error))
        return again or _code(error) in _AGAIN
    if isinstance(error, SSLError):
        return not any(sign in str(error) for sign in _WRONG_TLS)
    return isinstance(error, (*_TRANSIENT, RetriesExceededError))


def _is_missing(error: ClientError) -> bool:
    """Tell whether the server says that it does not have this call, or this condition of it."""
    return _status(error) == 501 or _code(error) == "NotImplemented"


def _translate(error: Exception, what: str, bucket: str) -> JobError:
    """Return the JobError that says what happened and what to do next."""
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return AccessDenied(f"{what}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role")
    if isinstance(error, ParamValidationError):
        return RecipeError(f"{what}: {bucket!r} is no name of a bucket; correct the address (store.uri of the recipe)")
    if not isinstance(error, ClientError):
        return Unreachable(f"{what}: {type(error).__name__}: {error}; check endpoint and network, then run again")
    if _code(error) == "RequestTimeTooSkewed":
        return AccessDenied(f"{what}: this machine's clock is {_measure_skew_s(error)} off; set it (chrony, NTP)")
    if _is_missing(error):
        return RecipeError(
            f"{what}: the server does not implement this; use another store, or set store.single_writer: true "
            "(--single-writer) if it lacks conditional writes and nothing else ever writes here"
        )
    return _translate_code(_code(error), _status(error), what, bucket)


def _measure_skew_s(error: ClientError) -> str:
    """Return by how many seconds the local clock differs from the server's, as far as its answer says."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        server = parsedate_to_datetime(headers["date"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return "some unknown number of seconds"
    return f"{time.time() - server:+.0f} s"


def _translate_code(code: str, status: int, what: str, bucket: str) -> JobError:
    if code == "NoSuchBucket":
        known = "store.uri (or data.source, model.id)"
        return NotFound(f"{what}: bucket {bucket!r} does not exist; create it or correct {known}")
    if code in _FAILED_CONDITION:
        return PreconditionFailed(f"{what}: another writer was faster")
    if code in _ABSENT:
        return NotFound(f"{what}: no such object")
    if code in _DENIED or status in (401, 403):
        return AccessDenied(f"{what}: {code or status}; check the credentials and their permissions on the prefix")
    if status in (301, 307, 400) and code not in _AGAIN:
        return RecipeError(f"{what}: {code or status}; check AWS_REGION and AWS_ENDPOINT_URL_S3 against the bucket")
    return Unreachable(f"{what}: {code or status}; the store answers with errors, run again later")


def create_bucket(bucket: str, variables: dict[str, str]) -> None:
    """Create a bucket of the embedded server that `variables` lead to; an existing one is left alone."""
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL_S3"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        region_name=variables["AWS_REGION"],
        config=Config(s3={"addressing_style": "path"}, proxies={}),
    )
    try:
        client.create_bucket(Bucket=bucket)
    except ClientError as error:
        if _code(error) not in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"):
            raise _translate(error, f"create bucket {bucket}", bucket) from None
