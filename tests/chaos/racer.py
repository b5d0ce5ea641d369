"""One racer: for every line [store, run id, seed] on stdin it makes an attempt on that run and says what came of it.

It does what a supervisor and its rank do with the store, without their processes: lease, fence, restore, checkpoints,
a stage record. Each swap of current.json is written down in PLACE/<run id>-<number>.jsonl.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from job.errors import JobError
from job.store import Attempt, RunStore, Store
from job.store.checkpoints import CheckpointWriter

TTL_S = 1
STEPS = 5


class Noting:
    """A store that writes down every successful swap of current.json."""

    def __init__(self, inside: Store, file: Path) -> None:
        self._inside, self._file, self.uri = inside, file, inside.uri

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        etag = self._inside.write(key, data, if_absent=if_absent, if_match=if_match)
        if key == "current.json":
            pointer = json.loads(data)
            swap = {"attempt": pointer["attempt"], "epoch": pointer["epoch"], "pointer": pointer}
            with self._file.open("a") as file:
                file.write(json.dumps(swap | {"etag": etag, "match": if_match}) + "\n")
        return etag


def attempt(place: Path, number: str, store: str, run_id: str, seed: int) -> None:
    """Own the run, restore, commit the steps that are left, commit a record."""
    rng, run = random.Random(seed), RunStore(store, run_id)
    run.objects = Noting(run.objects, place / f"{run_id}-{number}.jsonl")
    scratch = Path(tempfile.mkdtemp(dir=place))
    owner = Attempt(run, TTL_S, lambda: None)
    try:
        owner.begin(f"{number}-{seed}", ["train"])
        restored = owner.restore(scratch / "resume", 1 << 20)
        step = restored.manifest.about["step"] if restored else 0
        about = {"epoch": owner.epoch, "nonce": owner.nonce, "keep": 2, "peer_timeout_s": 10.0}
        writer = CheckpointWriter(run, 0, 1, about | {"committed": restored.committed if restored else []})
        while step < STEPS:
            step += 1
            time.sleep(rng.uniform(0, 0.05))
            folder = scratch / f"step-{step}"
            folder.mkdir()
            (folder / "model.safetensors").write_text(f"{step} {owner.nonce}")
            owner.check()
            writer.commit(folder, step, {"world_size": 1})
        owner.commit_record("train", {"key": "k", "outputs": owner.nonce})
    finally:
        owner.leave({"exit_code": 0, "reason": ""})
        shutil.rmtree(scratch)


def main(place: Path, number: str) -> None:
    """Make the attempts that stdin asks for."""
    logging.disable()
    for line in sys.stdin:
        store, run_id, seed = json.loads(line)
        try:
            attempt(place, number, store, run_id, seed)
            outcome = "done"
        except JobError as error:
            outcome = type(error).__name__
        print(outcome, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
