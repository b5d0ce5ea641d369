"""How many requests reach the server; their number has no noise, and on a far-away store it is the time one waits."""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.utils import parse_timestamp
from hypothesis import example, given
from hypothesis import strategies as st

from job.store import RunStore
from job.store.checkpoints import CheckpointWriter
from job.store.manifest import Manifest, describe_files, list_files
from job.store.objects import ObjectInfo
from job.store.parallel import LARGE_AT_A_TIME, SMALL_AT_A_TIME
from job.store.restore import fetch_checkpoint
from job.store.s3 import S3Store, _parse_time
from job.store.transfer import download_files, upload_files

FILES = 120
ATTEMPT = {"epoch": 1, "nonce": "0123456789abcdef", "keep": 2, "peer_timeout_s": 60.0}


@pytest.fixture
def store(s3: str) -> RunStore:
    """A run's place in a real S3 server, of which the writer of its checkpoints is the owner."""
    store = RunStore(f"{s3}/{uuid.uuid4().hex}", "run")
    store.write_json("owner.json", ATTEMPT)
    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of many small files."""
    for number in range(FILES):
        path = tmp_path / "checkpoint" / f"{number % 7}" / f"{number:03d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * 4096)
    return tmp_path / "checkpoint"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What botocore sends, by method, from now on."""
    from botocore.httpsession import URLLib3Session

    sent: Counter[str] = Counter()
    send: Callable[..., Any] = URLLib3Session.send

    def count(session: URLLib3Session, request: Any) -> Any:
        sent[request.method] += 1
        return send(session, request)

    monkeypatch.setattr(URLLib3Session, "send", count)
    return sent


def test_a_checkpoint_in_which_nothing_has_changed_sends_none_of_its_files(
    store: RunStore, folder: Path, requests: Counter[str]
) -> None:
    writer = CheckpointWriter(store, 0, 1, ATTEMPT)
    needed = []
    for step in (1, 2, 3):
        requests.clear()
        writer.commit(folder, step, {"world_size": 1})
        needed.append(requests.total())
    first, _, third = needed
    assert first > FILES, "every file is sent once"
    assert third <= 12, "its list, the manifest, the pointer, who owns the run, what is said of it, and what is deleted"


def test_files_of_checkpoints_are_listed_once_and_only_where_one_goes(
    store: RunStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    whole = store.objects.list

    def watch(prefix: str) -> Iterator[ObjectInfo]:
        for item in whole(prefix):
            listed.append(item.key)
            yield item

    monkeypatch.setattr(store.objects, "list", watch)
    writer = CheckpointWriter(store, 0, 1, ATTEMPT)
    for step in (1, 2):
        writer.commit(folder, step, {"world_size": 1})
    assert listed == []
    for step in (3, 4, 5, 6):
        writer.commit(folder, step, {"world_size": 1})
    counts = Counter(key.split("/")[1][:15] for key in listed)
    whole_one, pointing_one = FILES + 2, 2  # its files, its list of them and its manifest
    assert counts == {f"e0001-s0000000{step}": whole_one if step < 3 else pointing_one for step in (1, 2, 3, 4)}


def test_files_that_lie_there_already_cost_one_request_for_all_of_them(
    store: RunStore, folder: Path, requests: Counter[str], tmp_path: Path
) -> None:
    CheckpointWriter(store, 0, 1, ATTEMPT).commit(folder, 1, {"world_size": 1})
    pointer = store.read_json("current.json") or {}
    here, key, sha256 = tmp_path / "here", pointer["manifest"], pointer["manifest_sha256"]
    requests.clear()
    fetch_checkpoint(store.objects, key, sha256, here)
    assert requests["GET"] >= FILES, "the first time each is fetched"
    requests.clear()
    fetch_checkpoint(store.objects, key, sha256, here)
    assert requests == {"GET": 1}, "its manifest"


def test_files_whose_sizes_a_manifest_tells_cost_one_request_each(
    store: RunStore, folder: Path, requests: Counter[str], tmp_path: Path
) -> None:
    (folder / "empty").touch()
    entries = describe_files(folder, list_files(folder), "many")
    upload_files(store.objects, folder, entries)
    requests.clear()
    download_files(store.objects, Manifest("checkpoint", entries), tmp_path / "here")
    assert requests.total() <= len(entries) + 1


def test_a_file_in_ranges_costs_as_many_requests_where_its_size_is_known(
    s3: str, requests: Counter[str], tmp_path: Path
) -> None:
    store = S3Store(f"{s3}/{uuid.uuid4().hex}")
    (tmp_path / "file").write_bytes(bytes(40 << 20))
    store.upload(tmp_path / "file", "a")
    requests.clear()
    store.download("a", tmp_path / "copy", size=40 << 20)
    assert requests == {"GET": 3}


@pytest.mark.parametrize("endpoint", ["https://s3.eu-central-1.amazonaws.com", "https://s3.example.org"])
def test_no_connection_is_closed_because_so_many_others_are_open(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    store = S3Store("s3://bucket/prefix")
    most = max(LARGE_AT_A_TIME * store._transfer.max_concurrency, SMALL_AT_A_TIME)
    assert all(client.meta.config.max_pool_connections >= most for client in (store._client, store._mover))


CONTENT = bytes(2 << 20)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that is too large for one request without a plan."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


class Sent(Exception):
    """A request was ready to leave; it has the digest with which it is signed."""


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Callable[[], S3Store]:
    """Return how to open a store whose first request raises Sent."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    def stop(_: object, request: Any) -> None:
        digest = request.headers["X-Amz-Content-SHA256"]
        raise Sent(digest.decode() if isinstance(digest, bytes) else digest)

    monkeypatch.setattr("botocore.httpsession.URLLib3Session.send", stop)
    return lambda: S3Store("s3://bucket/prefix", allow_http=True)


@pytest.mark.parametrize(
    ("endpoint", "proxy", "is_hashed"),
    [
        ("https://s3.example.org", "", False),
        ("https://s3.example.org", "http://proxy.example.org:3128", False),
        ("http://127.0.0.1:9", "", False),
        ("http://127.0.0.1:9", "http://proxy.example.org:3128", True),
        ("http://s3.example.org", "", True),
    ],
)
def test_a_file_is_hashed_once_more_for_its_way_only_where_a_network_without_tls_could_change_it(
    endpoint: str, proxy: str, is_hashed: bool, sent: Callable[[], S3Store], file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, proxy)
    for name in ("NO_PROXY", "no_proxy"):  # the fixture of a local server sets them
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Sent) as caught:
        sent().upload(file, "file")
    assert caught.value.args[0] == (hashlib.sha256(CONTENT).hexdigest() if is_hashed else "UNSIGNED-PAYLOAD")


def test_a_record_is_hashed_for_its_way_wherever_it_goes(
    sent: Callable[[], S3Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example.org")
    with pytest.raises(Sent) as caught:
        sent().write("current.json", b"{}")
    assert caught.value.args[0] == hashlib.sha256(b"{}").hexdigest()


def test_who_asks_for_signed_payloads_in_the_aws_configuration_gets_them(
    sent: Callable[[], S3Store], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example.org")
    (tmp_path / "config").write_text("[default]\ns3 =\n  payload_signing_enabled = true\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(Sent) as caught:
        sent().upload(file, "file")
    assert caught.value.args[0] == hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize(
    "write",
    [lambda store, file: store.write("current.json", b"{}"), lambda store, file: store.upload(file, "small")],
    ids=["record", "small file"],
)
def test_a_small_write_is_one_round_trip(
    write: Callable[[S3Store, Path], Any], store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.awsrequest import AWSConnection

    asked = []
    monkeypatch.setattr(AWSConnection, "_handle_expect_response", lambda connection, body: asked.append(connection))
    (tmp_path / "small").write_bytes(CONTENT[: 1 << 20])
    write(store.objects, tmp_path / "small")
    assert not asked, "the server was asked first whether it wants what is written"


@example("19471101")  # seconds for botocore, a day for ISO 8601
@given(
    st.one_of(
        st.datetimes(timezones=st.just(UTC)).map(lambda time: time.isoformat()),
        st.datetimes(timezones=st.just(UTC)).map(lambda time: f"{time:%Y-%m-%dT%H:%M:%S}.000Z"),
        st.datetimes(datetime(1970, 1, 1), timezones=st.just(UTC)).map(format_datetime),
        st.integers(0, 1 << 33),
        st.integers(0, 1 << 33).map(str),
    )
)
def test_times_are_read_as_botocore_reads_them(value: object) -> None:
    assert _parse_time(value) == parse_timestamp(value)
