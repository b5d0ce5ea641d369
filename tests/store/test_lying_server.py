"""What speaks for the store answers 200 and no S3, or says that bytes changed on the way: never absence, never 10 or 1.

A captive portal, a gateway in maintenance, a proxy that drops headers: no real S3 server can be made to answer so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from job.errors import AccessDenied, Unreachable
from job.store import Store, open_store
from job.store.objects import SizeDiffers


class Answer(NamedTuple):
    """What is answered; without `length`, it has no Content-Length."""

    status: int = 200
    headers: dict[str, str] = {}  # never changed
    body: bytes = b""
    length: bool = True


class Liar(ThreadingHTTPServer):
    """Gives its `answers` one after the other, and then the last one for ever; counts the `requests`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.answers = [Answer()]
        self.requests = 0

    def say(self, *answers: Answer) -> None:
        """Begin anew with other answers."""
        self.answers, self.requests = list(answers), 0


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Liar

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests += 1
        given = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        self.send_response_only(given.status)
        for name, value in given.headers.items():
            self.send_header(name, value)
        if given.length:
            self.send_header("Content-Length", str(len(given.body)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(given.body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer


@contextmanager
def serve_lies() -> Iterator[Liar]:
    """Run a server as long as the block lasts."""
    with Liar() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> Iterator[Liar]:
    """A server that `s3://bucket` leads to."""
    monkeypatch.setattr(time, "sleep", lambda _: None)  # back-off only costs time here
    with serve_lies() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            monkeypatch.setenv(name, "made-up")
        yield server


@pytest.fixture
def store(liar: Liar) -> Store:
    return open_store("s3://bucket/prefix")


def in_xml(root: str, inside: str) -> bytes:
    return f'<?xml version="1.0"?><{root}>{inside}</{root}>'.encode()


def listing(inside: str) -> Answer:
    return Answer(body=in_xml("ListBucketResult", inside))


def error(code: str, status: int = 400) -> Answer:
    return Answer(status, body=in_xml("Error", f"<Code>{code}</Code><Message>m</Message>"))


PAGE = Answer(body=b"<html><body>maintenance</body></html>")
WHOLE = "<IsTruncated>false</IsTruncated>"
KEY = "<Contents><Key>prefix/a</Key><Size>1</Size></Contents>"

NO_LISTINGS = {
    "a page": PAGE,
    "nothing": Answer(),
    "no end": listing(KEY),
    "no token": listing(f"<IsTruncated>true</IsTruncated>{KEY}"),
    "no size": listing(f"{WHOLE}<Contents><Key>prefix/a</Key></Contents>"),
    "no key": listing(f"{WHOLE}<Contents><Size>1</Size></Contents>"),
}


@pytest.mark.parametrize("lie", NO_LISTINGS.values(), ids=NO_LISTINGS)
def test_an_answer_that_is_no_listing_is_no_proof_of_absence(
    liar: Liar, store: Store, lie: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar.say(lie, lie, listing(WHOLE + KEY))
    assert [item.key for item in store.list("")] == ["a"], "it is asked for again"
    assert liar.requests == 3
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.0)
    liar.say(lie)
    with pytest.raises(Unreachable, match="has no"):
        list(store.list(""))


@pytest.mark.parametrize("lie", [PAGE, listing(f"{WHOLE}<CommonPrefixes></CommonPrefixes>")], ids=["page", "no name"])
def test_an_answer_that_lists_no_folders_is_asked_for_again(liar: Liar, store: Store, lie: Answer) -> None:
    liar.say(lie, listing(f"{WHOLE}<CommonPrefixes><Prefix>prefix/a/</Prefix></CommonPrefixes>"))
    assert list(store.list_folders("")) == ["a/"]


def test_an_empty_listing_is_proof_of_absence(liar: Liar, store: Store) -> None:
    liar.say(listing(WHOLE))
    assert list(store.list("")) == []


def test_a_listing_that_never_gets_on_is_77(liar: Liar, store: Store) -> None:
    begin = f"<IsTruncated>true</IsTruncated>{KEY}"
    liar.say(*(listing(f"{begin}<NextContinuationToken>{token}</NextContinuationToken>") for token in "abb"))
    with pytest.raises(Unreachable, match="at the same place"):
        list(store.list(""))
    assert liar.requests == 3


TAGGED = Answer(headers={"ETag": '"e"'}, body=b"")
CALLS: dict[str, Callable[[Store, Path], Any]] = {
    "read": lambda store, file: store.read("a"),
    "write": lambda store, file: store.write("a", b""),
    "upload": lambda store, file: store.upload(file, "a"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_answer_without_an_etag_is_asked_for_again_then_77(
    liar: Liar, store: Store, tmp_path: Path, call: Callable[[Store, Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    liar.say(PAGE, TAGGED)
    call(store, tmp_path / "file")
    assert liar.requests == 2
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.0)
    liar.say(PAGE)
    with pytest.raises(Unreachable, match="has no ETag"):
        call(store, tmp_path / "file")


BEGUN = Answer(body=in_xml("InitiateMultipartUploadResult", "<UploadId>u</UploadId>"))
DONE = Answer(body=in_xml("CompleteMultipartUploadResult", "<ETag>e</ETag>"))
HALF_DONE = {
    "in one request": (2, [PAGE]),
    "begun": (17, [PAGE]),
    "a part": (17, [BEGUN, PAGE]),
    "completed by nothing": (17, [BEGUN, TAGGED, TAGGED, Answer()]),
    "completed by a page": (17, [BEGUN, TAGGED, TAGGED, PAGE]),
}


@pytest.mark.parametrize(("size_mib", "lies"), HALF_DONE.values(), ids=HALF_DONE)
def test_a_large_file_of_which_the_server_does_not_say_that_it_is_there_is_77(
    liar: Liar, store: Store, tmp_path: Path, size_mib: int, lies: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.0)
    (tmp_path / "file").write_bytes(bytes(size_mib << 20))
    liar.say(*lies)
    with pytest.raises(Unreachable, match=r"has no (ETag|UploadId)"):
        store.upload(tmp_path / "file", "a")


def test_a_large_file_whose_upload_was_not_completed_is_sent_again(liar: Liar, store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(17 << 20))
    aborted = Answer(204)
    liar.say(BEGUN, TAGGED, TAGGED, PAGE, aborted, BEGUN, TAGGED, TAGGED, DONE)
    store.upload(tmp_path / "file", "a")
    assert liar.requests == 9


def test_an_object_whose_size_is_not_told_is_asked_for_again_then_77(
    liar: Liar, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar.say(TAGGED._replace(length=False), TAGGED._replace(body=b"1234"))
    store.download("a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"1234"
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.0)
    liar.say(TAGGED._replace(length=False))
    with pytest.raises(Unreachable, match="has no ContentLength"):
        store.download("a", tmp_path / "copy")


@pytest.mark.parametrize("size", [4, 17 << 20], ids=["whole", "in ranges"])
def test_what_answers_for_an_object_of_a_known_size_is_not_taken_for_a_damaged_one(
    liar: Liar, store: Store, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.0)
    liar.say(PAGE)
    with pytest.raises(Unreachable, match="has no ETag"):
        store.download("a", tmp_path / "copy", size=size)
    whole, cut = TAGGED._replace(body=bytes(size)), TAGGED._replace(body=b"12")
    liar.say(cut, whole)
    with pytest.raises(Unreachable, match="know ranges"):
        store.download("a", tmp_path / "copy", size=size)
    liar.say(cut)
    with pytest.raises(SizeDiffers, match=f"2 bytes instead of {size}"):
        store.download("a", tmp_path / "copy", size=size)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("code", ["BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"])
def test_bytes_that_changed_on_their_way_are_sent_again_then_77(
    liar: Liar, store: Store, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar.say(error(code), error(code), TAGGED)
    assert store.write("a", b"{}") == '"e"'
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.0)
    liar.say(error(code))
    with pytest.raises(Unreachable, match=code):
        store.write("a", b"{}")


@pytest.mark.parametrize("code", ["InternalError", "ServiceUnavailable", "SlowDown"])
def test_one_key_of_many_that_could_not_be_deleted_now_is_deleted_later(liar: Liar, store: Store, code: str) -> None:
    failed = in_xml("DeleteResult", f"<Error><Key>prefix/a</Key><Code>{code}</Code></Error>")
    liar.say(Answer(body=failed), Answer(body=in_xml("DeleteResult", "")))
    store.delete(["a", "b"])
    assert liar.requests == 2


@pytest.fixture
def role(liar: Liar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Liar]:
    """What gives out the credentials of a role, as to a pod; they end so soon that each request wants new ones."""
    (tmp_path / "token").write_text("token")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/job")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "absent"))
    with serve_lies() as service:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{service.server_port}")
        service.say(give_role())
        yield service


def give_role() -> Answer:
    until = (datetime.now(UTC) + timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    keys = "".join(f"<{name}>made-up</{name}>" for name in ("AccessKeyId", "SecretAccessKey", "SessionToken"))
    given = f"<Credentials>{keys}<Expiration>{until}</Expiration></Credentials>"
    action = "AssumeRoleWithWebIdentity"
    return Answer(body=in_xml(f"{action}Response", f"<{action}Result>{given}</{action}Result>"))


def refuse_role(code: str, status: int) -> Answer:
    return Answer(status, body=in_xml("ErrorResponse", f"<Error><Code>{code}</Code><Message>m</Message></Error>"))


NO_ROLE = [("Throttling", 400), ("IDPCommunicationError", 400), ("InvalidIdentityToken", 400), ("AccessDenied", 403)]


@pytest.mark.parametrize(("code", "status"), NO_ROLE, ids=[row[0] for row in NO_ROLE])
def test_a_role_that_cannot_be_had_anew_is_asked_for_again_then_77(
    liar: Liar, role: Liar, code: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar.say(TAGGED)
    store = open_store("s3://bucket/prefix")
    store.write("a", b"")
    role.say(*[refuse_role(code, status)] * 7, give_role())  # botocore itself asks up to five times
    store.write("a", b"")
    assert role.requests > 7
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.0)
    role.say(refuse_role(code, status))
    with pytest.raises(Unreachable, match="no new ones came"):
        store.write("a", b"")


def test_a_role_that_was_never_had_is_12_but_77_where_too_many_ask_for_one(
    liar: Liar, role: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.store.s3.DEADLINE_S", 0.0)
    role.say(refuse_role("AccessDenied", 403))
    with pytest.raises(AccessDenied):
        open_store("s3://bucket/prefix").read("a")
    role.say(refuse_role("Throttling", 400))
    with pytest.raises(Unreachable, match="Throttling"):
        open_store("s3://bucket/prefix").read("a")
