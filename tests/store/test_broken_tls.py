"""TLS that breaks in the middle is a network that breaks: asked for again, then 77, and never a traceback.

A server of our own with a certificate of its own: a broken record cannot be had of a real one.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from job.errors import Unreachable
from job.store import Store, open_store

DATA = bytes(range(256)) * 400
BROKEN_RECORD = b"\x17\x03\x03\x00\x20" + bytes(32)
"""A record of application data that no key decrypts."""


class Breaker(ThreadingHTTPServer):
    """Sends DATA; `left` answers break `at` so many bytes of it, or before their first header where that is -1."""

    daemon_threads = True
    at, left, requests = 0, 0, 0

    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are the purpose here."""


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Breaker

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""

    def do_GET(self) -> None:
        self.server.requests += 1
        self.server.left -= 1
        if breaks := self.server.left >= 0:
            self.close_connection = True
        if not breaks or self.server.at >= 0:
            self.send_response_only(200)
            self.send_header("ETag", '"e"')
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()
            self.wfile.write(DATA[: self.server.at] if breaks else DATA)
        if breaks:
            os.write(self.connection.fileno(), BROKEN_RECORD)

    def do_HEAD(self) -> None:
        self.send_response_only(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()


def write_certificate(folder: Path) -> Path:
    """Write key and certificate of 127.0.0.1 into one file."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    place, day = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), timedelta(days=1)
    about = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    about = about.not_valid_before(datetime.now(UTC) - day).not_valid_after(datetime.now(UTC) + day)
    about = about.add_extension(place, critical=True)
    form = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    certificate = about.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (folder / "both.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *form) + certificate)
    return folder / "both.pem"


@pytest.fixture
def breaker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Breaker]:
    """A server that `s3://bucket` leads to, by TLS."""
    monkeypatch.setattr("job.store.s3.time.sleep", lambda _: None)  # back-off only costs time here
    context, certificate = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), write_certificate(tmp_path)
    context.load_cert_chain(certificate)
    with Breaker(("127.0.0.1", 0), _Connection) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"https://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            monkeypatch.setenv(name, "made-up")
        yield server
        server.shutdown()


def read(store: Store, place: Path) -> bytes:
    blob = store.read("a")
    assert blob
    return blob.data


def download(store: Store, place: Path) -> bytes:
    store.download("a", place / "copy")
    return (place / "copy").read_bytes()


def download_so_many_bytes(store: Store, place: Path) -> bytes:
    store.download("a", place / "copy", size=len(DATA))
    return (place / "copy").read_bytes()


@pytest.mark.parametrize("call", [read, download, download_so_many_bytes])
@pytest.mark.parametrize("at", [-1, 0, len(DATA) // 2])
def test_a_record_that_is_broken_is_asked_for_again_then_77(
    breaker: Breaker, at: int, call: Callable[[Store, Path], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaker.at, breaker.left, store = at, 2, open_store("s3://bucket/prefix")
    assert call(store, tmp_path) == DATA
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.0)
    breaker.at, breaker.left = min(at, 0), 1000  # what advances a little each time would come to an end
    with pytest.raises(Unreachable, match=r"SSLError.*then run again"):
        call(store, tmp_path)


def test_a_certificate_that_nobody_trusts_is_told_at_once(breaker: Breaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE")
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        open_store("s3://bucket/prefix").read("a")
    assert breaker.requests == 0
