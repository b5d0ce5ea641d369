"""Credentials from the metadata service of a machine of EC2, which now and then does not answer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from job.store import open_store
from job.store.server import DEFAULT_BUCKET

CREDENTIALS = {
    "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "ASIAEXAMPLE", "SecretAccessKey": "of-the-role",
    "Token": "of-the-role", "Expiration": "2099-01-01T00:00:00Z", "LastUpdated": "2026-01-01T00:00:00Z",
}  # fmt: skip


@contextmanager
def serve_metadata(unanswered: int) -> Iterator[str]:
    """Serve the credentials of a role as EC2 does; of the first `unanswered` requests only the line is cut."""
    left = [unanswered]

    class Service(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._answer("token")

        def do_GET(self) -> None:
            self._answer(json.dumps(CREDENTIALS) if self.path.endswith("/role") else "role")

        def _answer(self, text: str) -> None:
            if left[0]:
                left[0] -= 1
                self.connection.close()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_questions_that_the_metadata_service_does_not_answer_are_asked_again(
    moto: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in moto.items():
        if not name.endswith("_KEY") and not name.endswith("_KEY_ID"):
            monkeypatch.setenv(name, value)
    with serve_metadata(unanswered=4) as endpoint:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint)
        store = open_store(f"s3://{DEFAULT_BUCKET}/metadata")
        store.write("key", b"value")
        blob = store.read("key")
    assert blob is not None
    assert blob.data == b"value"
