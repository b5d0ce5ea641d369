"""A proxy between boto3 and a real S3 server that breaks what a network or a server can break.

`fault(request)` says what happens to each request:

    ""        forwarded as it is
    503 500 409 403 400 301 501    that status with the S3 error that goes with it, the server is not asked
    expired skew               403 ExpiredToken, 403 RequestTimeTooSkewed
    reset     the connection is dropped, the server is not asked
    lost      the server is asked, its answer is dropped
    cut       half of the answer's body, then the connection is dropped
    hole      no answer, until the proxy is closed
    strip     forwarded without If-Match and If-None-Match, as by a server that does not know them
    slow:S    forwarded after S seconds for every MiB of the request's body
"""

from __future__ import annotations

import http.client
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

BAD_NETWORK = {"503": 20, "reset": 5, "lost": 5, "cut": 5, "": 65}
"""Percent of the requests that end so: the figures that a whole run must bear."""

_ANSWERS = {
    "503": (503, "SlowDown"),
    "500": (500, "InternalError"),
    "409": (409, "ConditionalRequestConflict"),
    "403": (403, "AccessDenied"),
    "400": (400, "MissingContentMD5"),
    "301": (301, "PermanentRedirect"),
    "501": (501, "NotImplemented"),
    "expired": (403, "ExpiredToken"),
    "skew": (403, "RequestTimeTooSkewed"),
}
_CLOCK_AHEAD_S = 3600.0


@dataclass(frozen=True)
class Request:
    """What a fault is chosen by; `key` is the path behind the bucket, `number` counts from 0, `headers` are names."""

    method: str
    key: str
    query: str
    number: int
    headers: frozenset[str]


Fault = Callable[[Request], str]


class FaultProxy(ThreadingHTTPServer):
    """Forwards to `upstream` (host:port), as `fault` says; both may be changed while it serves."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, fault: Fault) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.upstream, self.fault = upstream, fault
        self.count: Counter[str] = Counter()
        self.seen: list[Request] = []
        self.closed, self._lock = threading.Event(), threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def choose(self, method: str, path: str, headers: frozenset[str]) -> str:
        """Return the fault for the next request, and remember both."""
        path, _, query = path.partition("?")
        with self._lock:
            key = unquote(path).lstrip("/").partition("/")[2]
            request = Request(method, key, query, len(self.seen), headers)
            fault = self.fault(request)
            self.seen.append(request)
            self.count[fault] += 1
        return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are the purpose here."""


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.choose(self.command, self.path, frozenset(name.lower() for name in self.headers))
        if fault in _ANSWERS:
            self.refuse(*_ANSWERS[fault], ahead_s=_CLOCK_AHEAD_S if fault == "skew" else 0)
        elif fault == "reset":
            self.close_connection = True
        elif fault == "hole":
            self.server.closed.wait()
            self.close_connection = True
        else:
            if fault.startswith("slow:"):
                self.server.closed.wait(float(fault.removeprefix("slow:")) * len(body) / (1 << 20))
            self.pass_on(body, fault)

    def pass_on(self, body: bytes, fault: str) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        if fault == "strip":
            headers = self.sign_without_conditions(headers)
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.request(self.command, self.path, body, headers)  # Host stays as it was signed
            answer = upstream.getresponse()
            data = answer.read()
        finally:
            upstream.close()
        length = int(answer.getheader("Content-Length", len(data)))
        if fault != "lost":
            self.reply(answer.status, answer.getheaders(), data[: len(data) // 2] if fault == "cut" else data, length)
        if fault in ("lost", "cut"):
            self.close_connection = True

    def sign_without_conditions(self, headers: dict[str, str]) -> dict[str, str]:
        """Return headers as of a client that set no condition: it is part of what is signed."""
        kept = {"content-length", "content-type", "content-md5", "x-amz-content-sha256", "host"}
        request = AWSRequest(self.command, f"http://{headers['Host']}{self.path}")
        for name, value in headers.items():
            if name.lower() in kept:
                request.headers[name] = value
        credentials = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
        S3SigV4Auth(credentials, "s3", os.environ["AWS_REGION"]).add_auth(request)
        return dict(request.headers.items())

    def refuse(self, status: int, code: str, ahead_s: float) -> None:
        data = f"<Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
        date = formatdate(time.time() + ahead_s, usegmt=True)
        body = b"" if self.command == "HEAD" else data
        self.reply(status, [("Content-Type", "application/xml"), ("Date", date)], body, len(body))

    def reply(self, status: int, headers: list[tuple[str, str]], data: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward


@contextmanager
def serve_faults(upstream: str, fault: Fault = lambda request: "") -> Iterator[FaultProxy]:
    """Run a proxy before `upstream` (host:port) as long as the block lasts."""
    proxy = FaultProxy(upstream, fault)
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.closed.set()
        proxy.shutdown()
        proxy.server_close()


def bad_network(seed: int, percent: dict[str, int] = BAD_NETWORK) -> Fault:
    """Return a fault that draws each request's fate with these odds."""
    chance = random.Random(seed)
    kinds, weights = list(percent), list(percent.values())
    return lambda request: chance.choices(kinds, weights)[0]


def first(number: int, kind: str, *methods: str, key: str = "") -> Fault:
    """The first `number` requests of these methods (all without any) whose key holds `key` end in `kind`."""
    left = iter(range(number))

    def fault(request: Request) -> str:
        meant = (not methods or request.method in methods) and key in request.key
        return kind if meant and next(left, None) is not None else ""

    return fault
