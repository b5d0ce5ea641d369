"""Lane `store`: our transfers beside boto3's defaults and the usual tools, against a real S3 server on loopback.

What counts is processor time of the client; the server works on the same cores, so that the wall clock, which stands
beside it, says as much of the server. Our sha256, which the others do not compute, is measured by itself and taken off
where the row says so. After each lane all files are compared, byte by byte.

What contenders run is `mover.py`.
"""

from __future__ import annotations

import filecmp
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from checkpoints import AWS, serve_afresh
from machine import open_venv
from racing import HERE, Interval, Turn, compare, race, run_command
from results import Bench, Row

from job.store.manifest import list_files
from job.store.server import DEFAULT_BUCKET

LARGE_MIB, SMALL_FILES, SMALL_BYTES = 256, 10_000, 4096
BUCKET = f"s3://{DEFAULT_BUCKET}"


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
    shutil.rmtree(bench.folder)
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
    copies.mkdir()

    def script(action: str) -> Call:
        return tool(sys.executable, HERE / "mover.py", action, bench.folder)

    env = variables | {"S3_ENDPOINT_URL": variables["AWS_ENDPOINT_URL_S3"]}  # what s5cmd calls it

    def tool(*words: object) -> Call:
        def call() -> Turn:
            take_memory(4 * (large / "file").stat().st_size)
            return run_command([bins / str(words[0]), *words[1:]], bench.folder, env)

        return call

    tools = {"aws s3 cp": ("aws", "s3", "cp", "--only-show-errors"), "s5cmd cp": ("s5cmd", "--log", "error", "cp")}
    up = {"job": script("up"), "boto3": script("boto3-up"), "unsigned": script("boto3-up-unsigned")}
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
        if "unsigned" in turns:
            unsigned = f"boto3 without signing the body, as over https, {way}"
            rows.append(compare_transfers(unsigned, turns, "unsigned", None, size_gb))
        rows.append(compare_tools(f"aws s3 cp, {way}, whole process", turns, "aws s3 cp", 1.3, size_gb))
        rows.append(compare_tools(f"s5cmd cp (Go), {way}, whole process", turns, "s5cmd cp", None, size_gb))
    return rows


def take_memory(size: int) -> None:
    """Fill so many bytes and let them go: a virtual machine's host may have taken them, for which who writes pays."""
    np.ones(size, dtype=np.uint8)


def compare_transfers(name: str, turns: dict[str, list[Turn]], peer: str, goal: float | None, size_gb: float) -> Row:
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
    # twice: once in the transfer, once to know how long it takes
    ours = [turn.cpu_s - 2 * turn.numbers["sha256_s"] for turn in turns["job"]]
    theirs = [turn.cpu_s for turn in turns[peer]]
    note = f"{np.median(ours) / size_gb:.2f} : {np.median(theirs) / size_gb:.2f} CPU s/GB without our sha256"
    return Row(name, "×", compare(theirs, ours), goal, note)


def judge_small(bench: Bench, bins: Path, variables: dict[str, str]) -> list[Row]:
    """Return the rows on many small files, and on a second time where nothing has changed."""
    small, copies = bench.folder / "small", bench.folder / "small-copies"
    sync = (bins / "aws", "s3", "sync", "--only-show-errors")

    def ours(action: str) -> Call:
        return lambda: run_command([sys.executable, HERE / "mover.py", action, bench.folder], bench.folder, variables)

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
    (theirs, ours), wall = ([turn.cpu_s for turn in turns[side]] for side in ("aws", "job")), compare_walls(turns)
    work = np.median([turn.numbers["cpu_s"] for turn in turns["job"]])
    note = f"{np.median(ours):.2f} : {np.median(theirs):.2f} CPU s ({work:.2f} of ours beside starting); wall {wall} ×"
    return Row(name, "×", compare(theirs, ours), goal, note)


def compare_walls(turns: dict[str, list[Turn]]) -> Interval:
    """Compare the wall clock of whole processes."""
    return compare(*([turn.wall_s for turn in turns[side]] for side in ("aws", "job")))


def check_equal(original: Path, *copies: Path) -> None:
    """Refuse to say how fast a transfer was that lost a bit."""
    for copy in copies:
        if not filecmp.cmp(original, copy, shallow=False):
            raise RuntimeError(f"{copy} differs from {original}")
