"""Lane `store`: our transfers beside boto3's defaults and the usual tools, against a real S3 server on loopback.

What counts is processor time of the client; the server works on the same cores, so that the wall clock, which stands
beside it, says as much of the server. Our sha256, which the others do not compute, is measured by itself and taken off
where the row says so. After each lane all files are compared, byte by byte.

python tests/bench/transfers.py ACTION FOLDER is what a contender runs; it prints what its transfer used.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from checkpoints import AWS, serve_afresh
from machine import open_venv
from racing import HERE, Stopwatch, Turn, compare, race, run_command
from results import Bench, Row

from job.store import RunStore, open_store
from job.store.checkpoints import CheckpointWriter
from job.store.manifest import Manifest, describe_files, hash_file, list_files
from job.store.server import DEFAULT_BUCKET
from job.store.transfer import download_files, upload_files

LARGE_MIB, SMALL_FILES, SMALL_BYTES = 256, 10_000, 4096
BUCKET = f"s3://{DEFAULT_BUCKET}"
STORE = f"{BUCKET}/ours"


def run_lane(bench: Bench) -> list[Row]:
    """Race one large file up and down, then many small ones, then the same again where nothing has changed."""
    bins = open_venv(bench.folder.parent, "aws", *AWS)
    make_files(bench)
    with serve_afresh(bench.folder / "s3") as variables:
        return [*judge_large(bench, bins, variables), *judge_small(bench, bins, variables)]


def make_files(bench: Bench) -> None:
    """Write what is sent: random bytes, which nothing can compress, always the same."""
    draw = np.random.default_rng(0)
    large, small = bench.folder / "large", bench.folder / "small"
    shutil.rmtree(large, ignore_errors=True), shutil.rmtree(small, ignore_errors=True)
    large.mkdir(parents=True), small.mkdir()
    (large / "file").write_bytes(draw.bytes((8 if bench.tiny else LARGE_MIB) << 20))
    for number in range(200 if bench.tiny else SMALL_FILES):
        folder = small / f"{number // 1000:02d}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number % 1000:03d}").write_bytes(draw.bytes(SMALL_BYTES))


Call = Callable[[], Turn]


def judge_large(bench: Bench, bins: Path, variables: dict[str, str]) -> list[Row]:
    """Return the rows on one large file; of the processes of boto3 and ours only the transfer counts."""
    large, copies = bench.folder / "large", bench.folder / "copies"
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir()

    def script(action: str) -> Call:
        return lambda: run_command(
            [sys.executable, HERE / "transfers.py", action, bench.folder], bench.folder, variables
        )

    env = variables | {"S3_ENDPOINT_URL": variables["AWS_ENDPOINT_URL_S3"]}  # what s5cmd calls it

    def tool(*words: object) -> Call:
        return lambda: run_command([bins / str(words[0]), *words[1:]], bench.folder, env)

    tools = {"aws s3 cp": ("aws", "s3", "cp", "--only-show-errors"), "s5cmd cp": ("s5cmd", "--log", "error", "cp")}
    up = {"job": script("up"), "boto3": script("boto3-up")}
    down = {"job": script("down"), "boto3": script("boto3-down")}
    for name, words in tools.items():
        up[name] = tool(*words, large / "file", f"{BUCKET}/{words[0]}")
        down[name] = tool(*words, f"{BUCKET}/{words[0]}", copies / words[0])
    sent, fetched = race(up, bench.rounds), race(down, bench.rounds)
    check_equal(large / "file", *(copies / name for name in ("job/file", "boto3", "aws", "s5cmd")))
    size_gb = (large / "file").stat().st_size / 1e9
    rows = []
    for way, turns, goal in (("up", sent, 2.0), ("down", fetched, 1.5)):
        rows.append(compare_transfers(f"boto3's default, {way}", turns, "boto3", goal, size_gb))
        rows.append(compare_tools(f"aws s3 cp, {way}, whole process", turns, "aws s3 cp", 1.3, size_gb))
        rows.append(compare_tools(f"s5cmd cp (Go), {way}, whole process", turns, "s5cmd cp", None, size_gb))
    return rows


def compare_transfers(name: str, turns: dict[str, list[Turn]], peer: str, goal: float, size_gb: float) -> Row:
    """Compare what the transfers used inside their processes, our sha256 taken off."""
    ours = [turn.numbers["cpu_s"] - turn.numbers["sha256_s"] for turn in turns["job"]]
    theirs = [turn.numbers["cpu_s"] for turn in turns[peer]]
    walls = ([turn.numbers["wall_s"] for turn in turns[side]] for side in (peer, "job"))
    digest = np.median([turn.numbers["sha256_s"] for turn in turns["job"]]) / size_gb
    note = (
        f"{np.median(ours) / size_gb:.2f} : {np.median(theirs) / size_gb:.2f} CPU s/GB without our sha256 "
        f"({digest:.2f}); wall, with it, {compare(*walls)} ×"
    )
    return Row(name, "×", compare(theirs, ours), goal, note)


def compare_tools(name: str, turns: dict[str, list[Turn]], peer: str, goal: float | None, size_gb: float) -> Row:
    """Compare whole processes, Python's start included, our sha256 taken off."""
    ours = [turn.cpu_s - turn.numbers["sha256_s"] - turn.numbers["beside_s"] for turn in turns["job"]]
    theirs = [turn.cpu_s for turn in turns[peer]]
    note = f"{np.median(ours) / size_gb:.2f} : {np.median(theirs) / size_gb:.2f} CPU s/GB without our sha256"
    return Row(name, "×", compare(theirs, ours), goal, note)


def judge_small(bench: Bench, bins: Path, variables: dict[str, str]) -> list[Row]:
    """Return the rows on many small files, and on a second time where nothing has changed."""
    small, copies = bench.folder / "small", bench.folder / "small-copies"
    sync = (bins / "aws", "s3", "sync", "--only-show-errors")

    def ours(action: str) -> Call:
        return lambda: run_command(
            [sys.executable, HERE / "transfers.py", action, bench.folder], bench.folder, variables
        )

    def theirs(*words: object) -> Call:
        return lambda: run_command([*sync, *words], bench.folder, variables)

    places = iter(f"{BUCKET}/sync-{number}" for number in range(bench.rounds))
    first = race({"job": ours("many-up"), "aws": lambda: theirs(small, next(places))()}, bench.rounds)
    place = f"{BUCKET}/sync-0"
    for prepare in (ours("commit"), ours("commit"), ours("many-down"), theirs(place, copies / "aws")):
        prepare()  # twice: what was committed before the last checkpoint is what the next points at
    again_up = race({"job": ours("commit"), "aws": theirs(small, place)}, bench.rounds)
    again_down = race({"job": ours("many-down"), "aws": theirs(place, copies / "aws")}, bench.rounds)
    files = list_files(small)
    for path in files:
        check_equal(small / path, copies / "job" / path, copies / "aws" / path)
    count = f"{len(files):,} files of {SMALL_BYTES} bytes"
    return [
        compare_syncs(f"aws s3 sync of {count}", first, 2.0),
        compare_syncs("aws s3 sync up where nothing has changed (our next checkpoint)", again_up, 10.0),
        compare_syncs("aws s3 sync down where nothing has changed (all files are hashed)", again_down, 10.0),
    ]


def compare_syncs(name: str, turns: dict[str, list[Turn]], goal: float) -> Row:
    """Compare whole processes, everything included."""
    theirs, ours = turns["aws"], [turn.cpu_s - turn.numbers["beside_s"] for turn in turns["job"]]
    wall = compare([turn.wall_s for turn in theirs], [turn.wall_s - turn.numbers["beside_s"] for turn in turns["job"]])
    note = f"{np.median(ours):.2f} : {np.median([turn.cpu_s for turn in theirs]):.2f} CPU s; wall {wall} ×"
    return Row(name, "×", compare([turn.cpu_s for turn in theirs], ours), goal, note)


def check_equal(original: Path, *copies: Path) -> None:
    """Refuse to say how fast a transfer was that lost a bit."""
    for copy in copies:
        if not filecmp.cmp(original, copy, shallow=False):
            raise RuntimeError(f"{copy} differs from {original}")


def transfer(action: str, folder: Path) -> dict[str, float]:
    """Do one transfer; return what it used, and what hashing the same bytes uses.

    `beside_s` is what this process used only to measure.
    """
    large, small = folder / "large", folder / "small"
    with Stopwatch() as used:
        ACTIONS[action](folder)
    with Stopwatch() as digest:
        if action in ("up", "down"):
            hash_file(large / "file")
    assert small.exists()
    return {"cpu_s": used.cpu_s, "wall_s": used.wall_s, "sha256_s": digest.cpu_s, "beside_s": digest.cpu_s}


def send_large(folder: Path) -> None:
    """Describe and upload, as a checkpoint is."""
    entries = describe_files(folder / "large", ["file"], "large")
    upload_files(open_store(STORE), folder / "large", entries)
    (folder / "large.json").write_bytes(Manifest("checkpoint", entries).to_bytes())


def fetch_large(folder: Path) -> None:
    """Download and verify, as a checkpoint is."""
    shutil.rmtree(folder / "copies" / "job", ignore_errors=True)
    download_files(open_store(STORE), read_manifest(folder / "large.json"), folder / "copies" / "job")


def send_by_boto3(folder: Path) -> None:
    """Upload with what boto3 does by itself."""
    import boto3

    boto3.client("s3").upload_file(str(folder / "large" / "file"), DEFAULT_BUCKET, "boto3")


def fetch_by_boto3(folder: Path) -> None:
    """Download with what boto3 does by itself."""
    import boto3

    boto3.client("s3").download_file(DEFAULT_BUCKET, "boto3", str(folder / "copies" / "boto3"))


def send_many(folder: Path) -> None:
    """Describe and upload all small files to a place of their own."""
    entries = describe_files(folder / "small", list_files(folder / "small"), f"many-{os.getpid()}")
    upload_files(open_store(STORE), folder / "small", entries)
    (folder / "small.json").write_bytes(Manifest("checkpoint", entries).to_bytes())


def fetch_many(folder: Path) -> None:
    """Bring the small files here where they are not."""
    download_files(open_store(STORE), read_manifest(folder / "small.json"), folder / "small-copies" / "job")


def commit_many(folder: Path) -> None:
    """Commit the small files as the next checkpoint of a run, as its training would."""
    state = folder / "attempt.json"
    attempt = json.loads(state.read_text()) if state.exists() else {"committed": [], "step": 0}
    store, step = RunStore(STORE, "small"), attempt["step"] + 1
    order = {"epoch": 1, "nonce": "0" * 32, "keep": 2, "peer_timeout_s": 60}
    if step == 1:
        store.write_json("owner.json", order)
    writer = CheckpointWriter(store, 0, 1, order | {"committed": attempt["committed"]})
    writer.commit(folder / "small", step, {"run_id": "small", "world_size": 1})
    pointer = store.read_json("current.json") or {}
    committed = [{key: pointer[key] for key in ("manifest", "manifest_sha256")}, *pointer["older"]]
    state.write_text(json.dumps({"committed": committed, "step": step}))


def read_manifest(path: Path) -> Manifest:
    """Return a manifest that a transfer before has left."""
    return Manifest.parse(path.read_bytes(), str(path))


ACTIONS = {
    "up": send_large, "down": fetch_large, "boto3-up": send_by_boto3, "boto3-down": fetch_by_boto3,
    "many-up": send_many, "many-down": fetch_many, "commit": commit_many,
}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(transfer(sys.argv[1], Path(sys.argv[2]))))
