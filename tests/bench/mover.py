"""What the contenders of lane `store` run: one transfer, by us or by boto3, in a process that imports nothing else.

python tests/bench/mover.py ACTION FOLDER prints what the transfer used. Clients are made before it is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from stopwatch import Stopwatch

from job.store import RunStore, open_store
from job.store.checkpoints import CheckpointWriter
from job.store.manifest import Manifest, ManifestEntry, describe_files, hash_file, list_files
from job.store.server import DEFAULT_BUCKET
from job.store.transfer import download_files, upload_files

STORE = f"s3://{DEFAULT_BUCKET}/ours"

Work = Callable[[], object]


def move(action: str, folder: Path) -> dict[str, float]:
    """Do one transfer; return what it used, and what hashing the same bytes uses where the other side does not."""
    work = ACTIONS[action](folder)
    with Stopwatch() as used:
        work()
    with Stopwatch() as digest:
        if action in ("up", "down"):
            hash_file(folder / "large" / "file")
    return {"cpu_s": used.cpu_s, "wall_s": used.wall_s, "sha256_s": digest.cpu_s}


def send_large(folder: Path) -> Work:
    """Describe and upload, as a checkpoint is."""
    store = open_store(STORE)

    def work() -> None:
        entries = describe_files(folder / "large", ["file"], "large")
        upload_files(store, folder / "large", entries)
        write_manifest(folder / "large.json", entries)

    return work


def fetch_large(folder: Path) -> Work:
    """Download and verify, as a checkpoint is."""
    store, target = open_store(STORE), folder / "copies" / "job"
    shutil.rmtree(target, ignore_errors=True)
    return lambda: download_files(store, read_manifest(folder / "large.json"), target)


def send_by_boto3(folder: Path) -> Work:
    """Upload with what boto3 does by itself."""
    import boto3

    client = boto3.client("s3")
    return lambda: client.upload_file(str(folder / "large" / "file"), DEFAULT_BUCKET, "boto3")


def send_unsigned_by_boto3(folder: Path) -> Work:
    """Upload with what boto3 does by itself where TLS protects the body: it is not hashed for its signature."""
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", config=Config(s3={"payload_signing_enabled": False}))
    return lambda: client.upload_file(str(folder / "large" / "file"), DEFAULT_BUCKET, "boto3")


def fetch_by_boto3(folder: Path) -> Work:
    """Download with what boto3 does by itself."""
    import boto3

    client = boto3.client("s3")
    return lambda: client.download_file(DEFAULT_BUCKET, "boto3", str(folder / "copies" / "boto3"))


def send_many(folder: Path) -> Work:
    """Describe and upload all small files to a place of their own."""
    store = open_store(STORE)

    def work() -> None:
        entries = describe_files(folder / "small", list_files(folder / "small"), f"many-{os.getpid()}")
        upload_files(store, folder / "small", entries)
        write_manifest(folder / "small.json", entries)

    return work


def fetch_many(folder: Path) -> Work:
    """Bring the small files here where they are not."""
    store, target = open_store(STORE), folder / "small-copies" / "job"
    return lambda: download_files(store, read_manifest(folder / "small.json"), target)


def commit_many(folder: Path) -> Work:
    """Commit the small files as the next checkpoint of a run, as its training would."""
    state = folder / "attempt.json"
    attempt = json.loads(state.read_text()) if state.exists() else {"committed": [], "step": 0}
    store, step = RunStore(STORE, "small"), attempt["step"] + 1
    order = {"epoch": 1, "nonce": "0" * 32, "keep": 2, "peer_timeout_s": 60}
    if step == 1:
        store.write_json("owner.json", order)

    def work() -> None:
        writer = CheckpointWriter(store, 0, 1, order | {"committed": attempt["committed"]})
        writer.commit(folder / "small", step, {"run_id": "small", "world_size": 1})
        pointer = store.read_json("current.json") or {}
        committed = [{key: pointer[key] for key in ("manifest", "manifest_sha256")}, *pointer["older"]]
        state.write_text(json.dumps({"committed": committed, "step": step}))

    return work


def write_manifest(path: Path, entries: dict[str, ManifestEntry]) -> None:
    """Leave a manifest for the way back."""
    path.write_bytes(Manifest("checkpoint", entries).to_bytes())


def read_manifest(path: Path) -> Manifest:
    """Return a manifest that a transfer before has left."""
    return Manifest.parse(path.read_bytes(), str(path))


ACTIONS = {
    "up": send_large, "down": fetch_large, "boto3-up": send_by_boto3, "boto3-down": fetch_by_boto3,
    "boto3-up-unsigned": send_unsigned_by_boto3,
    "many-up": send_many, "many-down": fetch_many, "commit": commit_many,
}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(move(sys.argv[1], Path(sys.argv[2]))))
