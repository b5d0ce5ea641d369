"""A run without a model: the real pipeline, supervisor, worker processes and commit protocol, with stages that
compute a hash chain instead of weights. A start costs two seconds instead of half a minute.

    python tests/chaos/light.py STORE RUN_ID WORK [--steps 12] [--save-steps 2] [--ranks 1] [--ttl 2]

The result is the last line on stdout, the exit code that of `job run`. `final_state` says what the chain must end with.
Variables scale what takes minutes in earnest: LIGHT_STEP_S, LIGHT_PAYLOAD_MIB (of a checkpoint), LIGHT_PART_MIB (of an
upload), LIGHT_DEADLINE_S (of one call to the store), LIGHT_MAX_UNSYNCED_S; JOB_FAILPOINT_RANK spares all ranks but one.
LIGHT_HUNGER_MIB is what step 6 takes of memory, LIGHT_FITTING_ROWS how many rows its GPU could hold,
LIGHT_BAD_ROW makes the fetch end with 11 (on
SLURM's node LIGHT_BAD_NODE), LIGHT_FULL_NODE is the one whose fetch ends with 78.
With `--nodes 2 --node-rank 1 --port 29400` it is one node of several, which meet at that port; their ranks vote in the
folder LIGHT_VOTES.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import struct
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from job.errors import DataError, Interrupted, ResourceExhausted
from job.failpoints import failpoint
from job.launch import Place, find_place, set_up_logging
from job.liveness import beat
from job.recipe import Recipe, Run
from job.store import RunStore, background
from job.store.background import BackgroundUploader
from job.store.checkpoints import CheckpointWriter
from job.store.manifest import hash_file, list_files

STEP_S = float(os.environ.get("LIGHT_STEP_S", "0.02"))
MAX_UNSYNCED_S = float(os.environ.get("LIGHT_MAX_UNSYNCED_S", "60"))
PAYLOAD_MIB = int(os.environ.get("LIGHT_PAYLOAD_MIB", "0"))
FITTING_ROWS = int(os.environ.get("LIGHT_FITTING_ROWS", "0"))
HUNGER_MIB = int(os.environ.get("LIGHT_HUNGER_MIB", "0"))
SAME_REQUEST_S = 1.0
"""As in the real rank: a batch system signals every process, and the supervisor passes it on; that is one request."""


def final_state(steps: int, rank: int = 0) -> str:
    """Return the state (hex) that `steps` uninterrupted steps lead to."""
    state = f"rank {rank}"
    for step in range(steps):
        state = advance(state, step)
    return state


def advance(state: str, step: int) -> str:
    return hashlib.sha256(f"{state} {step}".encode()).hexdigest()


def scale_down() -> None:
    """Shorten the store's deadlines as the variables ask."""
    if deadline := os.environ.get("LIGHT_DEADLINE_S"):
        from job.store import s3

        s3.DEADLINE_S, s3.READ_TIMEOUT_S, background._RETRY_S = float(deadline), float(deadline), 0.5
    if part := os.environ.get("LIGHT_PART_MIB"):
        from job.store import s3

        s3.PART_SIZE_MIB = int(part)


def fetch(run: Run) -> dict[str, Any]:
    """Stand for fetch_sources: a base model of 1600 parameters, and nothing to tokenize."""
    full = {"LIGHT_FULL_NODE": "SLURM_NODEID", "LIGHT_FULL_TASK": "SLURM_ARRAY_TASK_ID"}
    if any(os.environ.get(named, "none") == os.environ.get(here) for named, here in full.items()):
        time.sleep(1)
        raise ResourceExhausted("the disk is full")
    row = os.environ.get("LIGHT_BAD_ROW")
    if row and os.environ.get("LIGHT_BAD_NODE") in (None, os.environ.get("SLURM_NODEID")):
        raise DataError(f"row {row} is bad")
    base = run.cache / "base"
    if not base.exists():
        staging = run.cache / f"base-{os.getpid()}"
        staging.mkdir(parents=True)
        write_weights(staging / "model.safetensors", bytes(1600))
        (staging / "config.json").write_text('{"model_type": "bert"}')
        try:
            staging.rename(base)
        except OSError:
            shutil.rmtree(staging)
    run.write("sources.json", {"model": {"path": str(base), "release": None}})
    run.write("data.json", {"rows": {"test": 1000}})
    part = {"commit": None}
    return {"model": part, "data": part, "tokenizer_sha256": "0"}


class Told:
    """Counts requests to stop; the second one, later than `SAME_REQUEST_S`, leaves at once."""

    def __init__(self) -> None:
        self.count, self._first = 0, 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.count or now - self._first > SAME_REQUEST_S:
            self.count += 1
        self._first = self._first or now

    def keep_waiting(self) -> None:
        """Show life while the last upload runs."""
        beat()
        if self.count > 1:
            raise Interrupted("told twice to stop; the last committed checkpoint stays, run again to go on")


class Vote:
    """All ranks learn after each step whether any was told to stop, or uploads: one byte a step in a file a rank."""

    def __init__(self, run: Run, rank: int, ranks: int, epoch: int) -> None:
        folder = Path(os.environ.get("LIGHT_VOTES", run.folder / "train")) / f"votes-{epoch}"
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [folder / f"rank-{number:05d}" for number in range(ranks)]
        self._own, self._step = self._files[rank], 0

    def decide(self, told: bool, busy: bool) -> tuple[bool, bool]:
        """Cast this rank's vote, wait for everybody's; tell whether all stop here, and whether anybody is busy."""
        with self._own.open("ab") as file:
            file.write(b"%d" % (told + 2 * busy))
        self._step += 1
        votes = [int(self._read(file)) for file in self._files]
        return any(vote & 1 for vote in votes), any(vote & 2 for vote in votes)

    def _read(self, file: Path) -> bytes:
        while True:
            votes = file.read_bytes() if file.exists() else b""
            if len(votes) >= self._step:
                return votes[self._step - 1 : self._step]
            time.sleep(0.002)


def train(run: Run) -> dict[str, Any]:
    """One rank: advance the chain, save every `save_steps`, upload beside it, stop with a checkpoint when told to."""
    scale_down()
    attempt, recipe = run.read("attempt.json"), run.recipe
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("JOB_FAILPOINT_RANK", str(rank)) != str(rank):
        del os.environ["JOB_FAILPOINT"]
    told, vote = Told(), Vote(run, rank, ranks, attempt["epoch"])
    state, first = resume(attempt, rank)
    uploader = start_uploader(run, attempt, (rank, ranks))
    stopped, steps, every = False, recipe.training.max_steps or 0, recipe.training.save_steps or 1
    step = first
    while step < steps and not stopped:
        beat()
        time.sleep(STEP_S)
        uploader.check()
        state, step = advance(state, step), step + 1
        if step == 6:
            b"x" * (HUNGER_MIB << 20)
        if step == 4 and 0 < FITTING_ROWS < recipe.training.max_micro_batch_size:
            raise ResourceExhausted("too many rows", retry={"max_micro_batch_size": FITTING_ROWS})
        stopped, busy = vote.decide(told.count > 0, not uploader.is_free)
        stopped = stopped and step < steps
        if not busy:
            uploader.open_gate()
        if step % every == 0 or step == steps or stopped:
            uploader.submit(write_checkpoint(run, rank, step, state))
    if first == steps:
        uploader.submit(write_checkpoint(run, rank, steps, state))
    uploader.close(told.keep_waiting)
    if stopped or told.count:
        raise Interrupted(f"stopped at step {step} with a committed checkpoint; run again to go on", together=True)
    return {"steps": steps, "resumed_from": attempt["resumed_from"], "state": state} | dict.fromkeys(
        ("samples_per_second", "tokens_per_second", "world_size", "precision", "seconds")
    )


def resume(attempt: dict[str, Any], rank: int) -> tuple[str, int]:
    """Return this rank's state and step at the beginning."""
    if not attempt["resume"]:
        return f"rank {rank}", 0
    saved = json.loads((Path(attempt["resume"]) / f"state-{rank:05d}.json").read_text())
    return saved["state"], saved["step"]


def start_uploader(run: Run, attempt: dict[str, Any], place: tuple[int, int]) -> BackgroundUploader:
    """Return the queue whose checkpoints are committed in the background; `place` is (rank, ranks)."""
    rank, ranks = place
    writer = CheckpointWriter(RunStore(run.recipe.store.uri, run.run_id), rank, ranks, attempt)
    about = attempt["about"] | {"world_size": ranks}

    def upload(folder: Path) -> None:
        writer.commit(folder, int(folder.name.split("-")[1]), about)
        if rank == 0:
            run.final_model.mkdir(exist_ok=True)
            for name in ("config.json", "model.safetensors"):
                os.replace(folder / name, run.final_model / name)
        shutil.rmtree(folder)

    return BackgroundUploader(upload, shutil.rmtree, MAX_UNSYNCED_S, in_step=ranks > 1)


def write_checkpoint(run: Run, rank: int, step: int, state: str) -> Path:
    failpoint("checkpoint-write")
    folder = run.folder / "train" / f"checkpoint-{step:08d}-rank-{rank:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"state-{rank:05d}.json").write_text(json.dumps({"state": state, "step": step}))
    if rank == 0:
        write_weights(folder / "model.safetensors", bytes.fromhex(state) * 50)
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("never changes")
    if PAYLOAD_MIB:
        (folder / f"payload-{rank:05d}.bin").write_bytes(bytes.fromhex(state) * (PAYLOAD_MIB << 15))
    failpoint("checkpoint-written")
    return folder


def write_weights(path: Path, data: bytes) -> None:
    """Write a safetensors file with one tensor of bytes (numpy would double the time that a start takes)."""
    about = {"weight": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}
    header = json.dumps(about).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def bundle(run: Run) -> dict[str, Any]:
    """Stand for all stages after training: a bundle that holds the trained state."""
    run.bundle.mkdir(exist_ok=True)
    state = (run.final_model / "model.safetensors").read_bytes()[-32:].hex()
    for name, text in (("config.json", "{}"), ("state.txt", state), ("report.html", "<p>report</p>")):
        (run.bundle / name).write_text(text)
    if PAYLOAD_MIB:
        (run.bundle / "payload.bin").write_bytes(bytes.fromhex(state) * (PAYLOAD_MIB << 15))
    return {"files": {path: hash_file(run.bundle / path) for path in list_files(run.bundle) if path != "manifest.json"}}


def quantize(run: Run) -> dict[str, Any]:
    """No target, no file."""
    return {"targets": {}, "fp32": {}}


def run_light(options: argparse.Namespace) -> dict[str, Any]:
    """Run the pipeline with these stages; return its result."""
    from job import opening, stages  # the stages' own processes need not load them

    scale_down()
    stages.FETCH = "light:fetch"
    stages.STAGES = (
        stages.Stage("train", "light:train", stages.STAGES[0].reads, ("final/config.json", "final/model.safetensors")),
        stages.Stage("quantize", "light:quantize", ("export",), ()),
        stages.Stage("rehearse", "light:bundle", (), ("bundle/state.txt", "bundle/report.html")),
    )
    recipe = Recipe.model_validate(
        {
            "name": "light",
            "task": "text-classification",
            "model": {"id": "base"},
            "data": {"source": "none"},
            "training": {
                "max_steps": options.steps,
                "save_steps": options.save_steps,
                "global_batch_size": 12,
            },
            "distributed": {"processes_per_node": options.ranks or "auto"},
            "launch": {
                "grace_s": options.grace,
                "hang_timeout_s": options.hang_timeout,
                "join_timeout_min": options.join_timeout,
            },
            "store": {"uri": options.store, "lease_ttl_s": options.ttl},
        }
    )
    place = Place(options.nodes, options.node_rank, "127.0.0.1", options.port)
    place = find_place() if options.found_place else place
    return opening.run_node(recipe, options.run_id, Path(options.work), options.fresh, place)


def parse_options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("store", "run_id", "work"):
        parser.add_argument(name)
    for name, default in (("steps", 12), ("save-steps", 2), ("ranks", 1), ("ttl", 2), ("hang-timeout", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("grace", 20), ("nodes", 1), ("node-rank", 0), ("port", 0), ("join-timeout", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--found-place", action="store_true", help="be the node that the environment says")
    return parser.parse_args(words)


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    )
    set_up_logging(sys.stderr)
    outcome = run_light(parse_options(sys.argv[1:]))
    print(json.dumps(outcome), flush=True)
    os._exit(int(outcome["exit_code"]))  # as `job run`: a transfer that was given up may still run in its threads
