"""Our side of the lanes that train: the real loop of a rank, in a process that stays, its turns measured from inside.

What is measured are calls of transformers.Trainer's own names (`train`, `_save_checkpoint`), so that whatever the house
does behind them counts.
"""

from __future__ import annotations

import os
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from racing import Turn
from stopwatch import Stopwatch

from job.data import fetch_sources
from job.launch import Place, find_free_port, find_topology
from job.recipe import Run, load_recipe
from job.recipe.schema import Distributed
from job.store import RunStore

EPOCH, NONCE = 1, "0" * 31 + "1"


def write_recipe(path: Path, model: Path, data: dict[str, Any], store: str, **training: Any) -> Path:
    """Write a recipe for text classification; what `training` does not say has the house's defaults."""
    sections = {
        "name": "bench",
        "task": "text-classification",
        "model": {"id": str(model)},
        "data": data,
        "training": training,
        "baselines": [],
        "store": {"uri": store},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(sections))
    return path


class Rank:
    """One rank of a run of its own, which trains anew in every turn."""

    def __init__(self, recipe: Path, work: Path, name: str) -> None:
        self.run = Run(name, load_recipe(str(recipe), []), work)
        self.run.save()
        fetch_sources(self.run)
        self._stalls: dict[int, tuple[float, float]] = {}
        self._loop, self._tokens = Stopwatch(), 0
        self._watch()

    def _watch(self) -> None:
        from job.train.trainer import JobTrainer

        train, save, step = JobTrainer.train, JobTrainer._save_checkpoint, JobTrainer.training_step

        def train_watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            with self._loop:
                return train(trainer, *args, **kwargs)

        def save_watched(trainer: Any, *args: Any, **kwargs: Any) -> None:
            began, at = time.perf_counter(), time.time()
            save(trainer, *args, **kwargs)
            self._stalls.setdefault(trainer.state.global_step, (at, time.perf_counter() - began))

        def step_watched(trainer: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._tokens += int(inputs["attention_mask"].sum())
            return step(trainer, model, inputs, *args, **kwargs)

        for name, watched in (
            ("train", train_watched),
            ("_save_checkpoint", save_watched),
            ("training_step", step_watched),
        ):
            setattr(JobTrainer, name, watched)

    def take_turn(self) -> Turn:
        """Train from the start; the loop is measured, and of each save the stall and when it was durable."""
        from job.train import run_rank

        run, store = self.run, RunStore.of(self.run)
        shutil.rmtree(run.folder / "train", ignore_errors=True)
        store.objects.delete([item.key for item in store.objects.list("checkpoints/")])
        store.objects.delete(["current.json"])
        order = {"epoch": EPOCH, "nonce": NONCE, "keep": 2, "peer_timeout_s": 60}
        store.write_json("owner.json", order)  # who commits asks whether the run is still his
        run.write("attempt.json", order | {"resume": None, "resumed_from": None, "about": {"engine": "ddp"}})
        self._stalls.clear()
        self._tokens = 0
        enter_new_group(run.recipe.distributed)
        run_rank(run)
        events = (store.read_json(f"attempts/{EPOCH}-checkpoints.json") or {}).get("events", [])
        committed = {
            event["step"]: datetime.fromisoformat(event["at"]).timestamp() for event in events if "at" in event
        }
        sizes = [(item.key, item.size) for item in store.objects.list("checkpoints/")]
        saves = {
            step: {
                "stall_s": stall_s,
                "durable_s": committed[step] - at,
                "bytes": sum(size for key, size in sizes if f"-s{step:08d}-" in key),
            }
            for step, (at, stall_s) in self._stalls.items()
            if step in committed
        }
        return Turn(self._loop.cpu_s, self._loop.wall_s, {"saves": saves, "tokens": self._tokens})


def read_settings() -> dict[str, str]:
    """Return what the supervisor tells a rank of threads and memory before it loads torch; not how many threads."""
    (variables,) = find_topology(Distributed(processes_per_node=1), Place()).rank_environments(0)
    return {name: value for name, value in variables.items() if name.startswith(("GOMP_", "MALLOC_"))}


def enter_new_group(distributed: Distributed) -> None:
    """Set what the supervisor tells its only rank, and let accelerate forget the process group of the last turn."""
    from accelerate.state import AcceleratorState

    (variables,) = find_topology(distributed, Place()).rank_environments(find_free_port())
    os.environ.update({name: value for name, value in variables.items() if name != "OMP_NUM_THREADS"})
    AcceleratorState._reset_state(reset_partial_state=True)
