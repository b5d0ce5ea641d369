"""Whatever lies where a pointer, a manifest, a lease or a stage record should lie: no traceback, no file outside.

Shapes are drawn (hypothesis), bytes are flipped, and what a seal covers is sealed again, as somebody with the right to
write could do. `FUZZ=100` draws 100,000.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

from job.errors import JobError
from job.identity import check_checkpoint, compare_runs
from job.store import Manifest, RunStore, latest_release
from job.store.attempt import Attempt, read_stage
from job.store.checkpoints import CheckpointWriter
from job.store.commit import fence, move_pointer, read_pointer
from job.store.inventory import list_events, list_inventory
from job.store.lease import verify_owner
from job.store.ledger import Ledger
from job.store.objects import Blob
from job.store.records import dump, has_seal, parse_leniently, seal
from job.store.release import read_release_manifest
from job.store.restore import restore_newest

KEYS = st.sampled_from(
    ["manifest", "manifest_sha256", "older", "since", "epoch", "step", "attempt", "nonce", "lost", "kind", "files",
     "about", "seal", "size", "sha256", "key", "version", "released", "seq", "pid", "host", "events", "began", "at",
     "model.safetensors", "world_size", "record", "outputs"]
)  # fmt: skip
HOSTILE = st.sampled_from(
    ["../../outside", "/etc/passwd", "a/../../outside", "..", ".", "", "a\\..\\b", "a\x00b", "\ud800", "x" * 5000,
     "checkpoints/e0001-s00000010-00000000/manifest.json", "checkpoints/e0001-s00000010-00000000/../../../outside",
     "0" * 64, "file:///etc", "s3://other/bucket"]
)  # fmt: skip
NUMBERS = st.integers(-3, 3) | st.integers(-(10**30), 10**30) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | HOSTILE
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | HOSTILE, inner, max_size=4),
    max_leaves=8,
)
CHANGES = st.dictionaries(KEYS, JSON, max_size=4)
FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), max_size=3)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run that has two checkpoints, a stage record, a ledger, and a canary beside it."""
    place = tmp_path_factory.mktemp("template")
    (place / "outside").write_text("canary")
    run = RunStore(str(place / "store"), "run-1")
    run.write_json("run.json", ABOUT)
    attempt = Attempt(run, 30, lambda: None)
    attempt.begin("work", ["train"])
    about = {"epoch": attempt.epoch, "nonce": attempt.nonce, "keep": 2, "peer_timeout_s": 60.0}
    writer = CheckpointWriter(run, 0, 1, about)
    for step in (10, 20):
        folder = place / f"step-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(random.Random(step).randbytes(200))
        writer.commit(folder, step, EXPECTED | {"world_size": 1})
        shutil.rmtree(folder)
    attempt.commit_record("train", {"key": "k", "outputs": "o", "files": {}, "record": {}})
    attempt.leave({"exit_code": 75, "reason": ""})
    return place


@pytest.fixture(scope="module")
def place(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy for this module, mended after every example."""
    return Path(shutil.copytree(template, tmp_path_factory.mktemp("fuzzed") / "place"))


def change(data: bytes, changes: dict[str, Any], flips: list[tuple[float, bytes]], sealed: bool) -> bytes:
    """Return a record with some keys replaced, perhaps sealed again, and some bytes replaced."""
    record = json.loads(data) | changes
    data = bytes(dump(seal(record)) if sealed else dump(record))
    for where, replacement in flips:
        at = int(where * len(data))
        data = data[:at] + replacement + data[at + 1 :]
    return data


def read_everything(run: RunStore, scratch: Path) -> None:
    """Do what an attempt and `job show` do with a run's records; only a JobError may come of it."""
    objects = run.objects

    def resume() -> None:
        restored = restore_newest(objects, fence(objects, 10**40, "attempt")[0], scratch, 1 << 20)
        if restored:
            check_checkpoint(restored.manifest, EXPECTED)

    calls: list[Callable[[], object]] = [
        lambda: read_pointer(objects),
        lambda: verify_owner(objects, 1, "nobody"),
        lambda: read_stage(objects, "train"),
        lambda: [list(rows) for _, _, rows in list_inventory(run.uri)],
        lambda: [list(rows) for _, _, rows in list_events(run.uri)],
        lambda: Ledger(run, 99, "work", "progress").begin(),
        lambda: compare_runs(run.read_json("run.json") or {}, ABOUT),
        resume,
        lambda: move_pointer(objects, {"epoch": 10**41, "attempt": "a", "nonce": "n"}, None),
    ]
    for call in calls:
        try:
            call()
        except JobError as error:
            assert error.exit_code in (10, 13, 16, 17, 18, 19, 76)
            str(error).encode(errors="backslashreplace")


ABOUT: dict[str, Any] = {"run_id": "run-1", "identity": {}, "material": {"a": 1}, "recipe": {"a": 1}}
EXPECTED: dict[str, Any] = {
    "run_id": "run-1", "format": 1, "engine": "ddp", "tuning": "full", "base_model": "0", "material_sha256": "0",
    "versions": {"torch": "2.1"},
}  # fmt: skip
RECORDS = [
    "current.json", "owner.json", "stages/train.json", "attempts/1.json", "attempts/1-checkpoints.json", "run.json",
]  # fmt: skip


@fuzz(100)
@given(name=st.sampled_from(RECORDS), changes=CHANGES, flips=FLIPS, sealed=st.booleans())
def test_no_record_of_a_run_breaks_who_reads_it_or_leads_outside(
    place: Path, template: Path, name: str, changes: dict[str, Any], flips: list[tuple[float, bytes]], sealed: bool
) -> None:
    run = RunStore(str(place / "store"), "run-1")
    data = (template / "store/runs/run-1" / name).read_bytes()
    run.objects.write(name, change(data, changes, flips, sealed))
    try:
        read_everything(run, place / "scratch")
        assert (place / "outside").read_text() == "canary"
        assert {path.name for path in place.iterdir()} <= {"store", "outside", "scratch"}
    finally:
        for kept in ("current.json", name):
            run.objects.write(kept, (template / "store/runs/run-1" / kept).read_bytes())


@pytest.mark.parametrize("depth", [100, *range(900, 1000), 2000])
def test_a_record_that_is_nested_deeper_than_one_can_be_written_has_no_seal(depth: int) -> None:
    """How deep that is depends on the version of Python, and on how deep the call lies."""
    nested = b'{"seal": "0", "x": ' + b'{"x":' * depth + b"1" + b"}" * depth + b"}"
    assert not has_seal(parse_leniently(Blob(nested, "e")))


ENTRIES = st.dictionaries(
    KEYS | HOSTILE, st.fixed_dictionaries({"size": SCALARS, "sha256": SCALARS, "key": SCALARS}) | JSON, max_size=3
)


@fuzz(800)
@given(entries=ENTRIES, changes=CHANGES, flips=FLIPS, sealed=st.booleans())
def test_no_manifest_breaks_who_reads_it_or_leads_outside(
    entries: dict[str, Any], changes: dict[str, Any], flips: list[tuple[float, bytes]], sealed: bool
) -> None:
    data = change(b'{"kind": "checkpoint", "about": {"step": 1}}', {"files": entries} | changes, flips, sealed)
    try:
        manifest = Manifest.parse(data, "here")
    except JobError as error:
        assert error.exit_code in (17, 19)
        return
    for path, entry in manifest.files.items():
        for name in (path, entry.key):
            assert Path("/root", name).resolve().is_relative_to("/root")
        assert type(entry.size) is int
        assert entry.size >= 0
        assert len(entry.sha256) == 64


@fuzz(100)
@given(data=JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40))
def test_no_pointer_of_a_model_leads_outside(place: Path, data: bytes) -> None:
    model = RunStore(str(place / "store"), "run-1").uri.replace("runs/run-1", "models/m")
    Path(model).mkdir(parents=True, exist_ok=True)
    Path(model, "current.json").write_bytes(data)
    try:
        release = latest_release(model)
        assert Path(release).resolve().is_relative_to(place / "store")
        read_release_manifest(release)
    except JobError as error:
        assert error.exit_code in (13, 16, 17, 19)
