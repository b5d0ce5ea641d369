"""A proxy before a real S3 server refuses, drops and cuts answers: nothing is lost, and no byte is wrong."""

from __future__ import annotations

import http.client
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from job.errors import Unreachable
from job.store import RunStore, open_store
from job.store.commit import CheckpointWriter, move_pointer

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"
Fault = Callable[[str, str], str | None]


class Proxy(ThreadingHTTPServer):
    """Forwards to `upstream`, unless `fault(method, path)` says "503", "reset", "lost" or "cut" (in half)."""

    daemon_threads = True

    def __init__(self, upstream: str, fault: Fault) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.fault, self.lock = upstream, fault, threading.Lock()
        self.count: dict[str, int] = {}

    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are the purpose here."""


class Handler(BaseHTTPRequestHandler):
    """One connection of the proxy."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            fault = self.server.fault(self.command, self.path) or "none"
            self.server.count[fault] = self.server.count.get(fault, 0) + 1
        if fault == "503":
            self.reply(503, [("Content-Type", "application/xml")], SLOW_DOWN, len(SLOW_DOWN))
        if fault in ("none", "lost", "cut"):
            upstream = http.client.HTTPConnection(self.server.upstream)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            upstream.request(self.command, self.path, body, headers)  # Host stays as it was signed
            answer = upstream.getresponse()
            data = answer.read()
            length = int(answer.getheader("Content-Length", len(data)))
            if fault != "lost":
                self.reply(
                    answer.status, answer.getheaders(), data[: len(data) // 2] if fault == "cut" else data, length
                )
            upstream.close()
        if fault in ("reset", "lost", "cut"):
            self.close_connection = True

    def reply(self, status: int, headers: list[tuple[str, str]], data: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward


@pytest.fixture
def through_proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Fault], tuple[str, Proxy]]]:
    """Put a proxy with the given faults before the server; returns an unused URI and the proxy."""
    proxies: list[Proxy] = []
    monkeypatch.setattr(time, "sleep", lambda _: None)  # back-off is botocore's affair; here it only costs time

    def start(fault: Fault) -> tuple[str, Proxy]:
        proxy = Proxy(urlsplit(os.environ["AWS_ENDPOINT_URL_S3"]).netloc, fault)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.server_port}")
        proxies.append(proxy)
        return f"{s3}/{uuid.uuid4().hex}", proxy

    yield start
    for proxy in proxies:
        proxy.shutdown()
        proxy.server_close()


def first(number: int, kind: str, *methods: str) -> Fault:
    """The first `number` requests of these methods end in `kind`."""
    left = iter(range(number))
    return lambda method, path: kind if method in methods and next(left, None) is not None else None


@pytest.mark.parametrize("kind", ["503", "reset"])
def test_more_refusals_than_botocore_bears_are_waited_out(
    through_proxy: Callable[[Fault], tuple[str, Proxy]], tmp_path: Path, kind: str
) -> None:
    (tmp_path / "source").write_bytes(b"file")
    uri, proxy = through_proxy(first(12, kind, "PUT"))
    store = open_store(uri)
    store.upload(tmp_path / "source", "file")
    proxy.fault = first(12, kind, "GET")
    found = store.read("file")
    assert found is not None
    assert found.data == b"file"
    assert proxy.count[kind] == 24


def test_refusals_without_end_are_77_naming_the_answer(
    through_proxy: Callable[[Fault], tuple[str, Proxy]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.0)
    (tmp_path / "source").write_bytes(b"file")
    store = open_store(through_proxy(lambda *_: "503")[0])
    for call in (lambda: store.upload(tmp_path / "source", "a"), lambda: store.read("a"), lambda: list(store.list(""))):
        with pytest.raises(Unreachable, match=r"503|SlowDown") as caught:
            call()
        assert caught.value.exit_code == 77


@pytest.mark.parametrize("size", [1000, 20 << 20], ids=["small", "parts"])
def test_a_cut_answer_is_asked_for_again(
    through_proxy: Callable[[Fault], tuple[str, Proxy]], tmp_path: Path, size: int
) -> None:
    uri, proxy = through_proxy(first(3, "cut", "GET"))
    store, data = open_store(uri), random.Random(size).randbytes(size)
    (tmp_path / "source").write_bytes(data)
    store.upload(tmp_path / "source", "file")
    found = store.read("file")
    assert found is not None
    assert found.data == data
    proxy.fault = first(3, "cut", "GET")
    store.download("file", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data
    assert proxy.count["cut"] == 6


@pytest.mark.parametrize("standing", [True, False])
def test_a_pointer_whose_answer_was_lost_is_ones_own(
    through_proxy: Callable[[Fault], tuple[str, Proxy]], standing: bool
) -> None:
    uri, proxy = through_proxy(lambda *_: None)
    store = open_store(uri)
    etag = move_pointer(store, {"epoch": 1, "nonce": "before"}, None) if standing else None
    proxy.fault = first(1, "lost", "PUT")
    etag = move_pointer(store, {"epoch": 1, "nonce": "mine"}, etag)
    assert proxy.count["lost"] == 1
    assert move_pointer(store, {"epoch": 1, "nonce": "next"}, etag)


@pytest.mark.parametrize("seed", range(4))
def test_checkpoints_through_a_bad_network_are_whole(
    through_proxy: Callable[[Fault], tuple[str, Proxy]], tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    kinds, weights = [None, "503", "reset", "lost", "cut"], [65, 20, 5, 5, 5]
    uri, proxy = through_proxy(lambda method, path: chance.choices(kinds, weights)[0])
    store = RunStore(uri, "run-1")
    attempt = {"epoch": store.next_epoch(), "nonce": "0123456789abcdef", "keep": 2, "peer_timeout_s": 60}
    writer = CheckpointWriter(store, 0, 1, attempt)
    for step in range(1, 6):
        folder = tmp_path / f"step{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(chance.randbytes(50_000))
        (folder / "state.json").write_text(str(step))
        writer.commit(folder, step, {})
        pointer = store.current_checkpoint()
        assert pointer is not None
        assert pointer["step"] == step
        store.fetch_checkpoint(pointer, tmp_path / f"fetched{step}", lambda path: True)
        for path in folder.iterdir():
            assert (tmp_path / f"fetched{step}" / path.name).read_bytes() == path.read_bytes()
    assert sum(number for kind, number in proxy.count.items() if kind != "none") > 5
