"""transformers.Trainer with checkpoints of ours: what a save takes and where it goes on, and which model is the best.

A save copies the state and goes on; a thread of `snapshot.py` writes the weights. What is small is written at once, and
the optimizer's state goes from the copy to the store (`HeldFile`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from transformers import Trainer

from job.failpoints import failpoint
from job.liveness import beat
from job.recipe import Run
from job.store.held import HeldFile
from job.train.checkpoint import (
    STATE_FILE,
    gather_weights,
    read_engine,
    read_random_state,
    read_samples,
    read_scaler,
    read_weights,
    write_engine,
    write_random_state,
    write_weights,
)
from job.train.fragments import find_optimizer, is_sharded, list_fragments, name_flats, read_engine_weights
from job.train.methods import name_moved
from job.train.progress import BeforeSteps, Pace
from job.train.selection import BestWeights, Standing, judge
from job.train.shards import gather_shard, hold_shard, read_shards, write_steps
from job.train.snapshot import Snapshot, Written
from job.train.stream import SampleDigest

_ROOM_BYTES = 16 << 20
"""For buffers that are no weights, and for what aligning takes."""

# Trainer calls this function for every resume under DeepSpeed and offers no other way to load; ours comes right after,
# in `_load_optimizer_and_scheduler`
transformers.trainer.deepspeed_load_checkpoint = lambda *_, **__: None


class SavingTrainer(Trainer):
    """See the module. `on_checkpoint` receives every checkpoint's folder, and what is written there in the end."""

    optimizer: Any
    _snapshot: Snapshot

    def __init__(self, run: Run, metric: str, **arguments: Any) -> None:
        self._run, self._metric = run, metric
        self.on_checkpoint: Callable[[Path, Future[Written]], None] = lambda folder, written: None
        self.resumed_from, self._saved_step = -1, -1
        self.samples = SampleDigest()
        self._takes_best, self.best = run.recipe.training.load_best_model_at_end, BestWeights(run.folder / "train")
        self._moved = name_moved(arguments["model"], run.recipe.tuning)
        self._pace = Pace(arguments["args"].world_size)
        super().__init__(**arguments, callbacks=[BeforeSteps(self._make_room)])

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As Trainer's, but a training that was finished before gets no epoch: Trainer would do one step more."""
        epochs, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        return (0 if self.resumed_from >= max_steps else epochs, *others, max_steps)

    def save(self) -> None:
        """Write a checkpoint of the current step, unless that was done."""
        self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copy this rank's part of a checkpoint; hand the folder in which it is being written to `on_checkpoint`."""
        step, rank = self.state.global_step, self.args.process_index
        if step == self._saved_step:
            return
        beat()
        failpoint("checkpoint-write")
        folder = self._run.folder / "train" / f"checkpoint-{step:08d}-rank-{rank:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        with self._pace.pause():
            self._snapshot.begin()
            written = self._snapshot.write(self._take_state(folder, rank))
        beat()
        self._saved_step = step
        self.on_checkpoint(folder, written)

    def _take_state(self, folder: Path, rank: int) -> Callable[[], list[HeldFile]]:
        """Copy what is large, write what is small; return a call that writes the copied weights and needs nothing else.

        They are wanted on this node, too. The optimizer's moments are not: they can be sent from memory.
        """
        engine, optimizer, keep = self._engine, find_optimizer(self.optimizer), self._snapshot.keep
        weights = gather_weights(self.model, engine, self._moved, keep)
        shard = None
        if rank == 0 or is_sharded(engine):
            shard = gather_shard(optimizer, list_fragments(self.model, engine), keep)
        if rank == 0:
            write_steps(optimizer, name_flats(self.model, engine), folder)
            if self.chosen_step != self.state.global_step:
                self.best.add_to(folder)
            write_engine(engine, self.lr_scheduler, self.accelerator.scaler, folder)
            self.state.save_to_json(str(folder / STATE_FILE))
        write_random_state(rank, self.samples, folder)

        def write() -> list[HeldFile]:
            if rank == 0:
                write_weights(self.model, weights, folder, whole=self._moved is None)
                shutil.copytree(self._run.tokenizer, folder, dirs_exist_ok=True)
            failpoint("checkpoint-written")
            return [hold_shard(shard, folder, rank)] if shard is not None else []

        return write

    def _make_room(self) -> None:
        """Allocate memory for this rank's part of a checkpoint: fp32 weights, and two moments of each fragment."""
        engine, rank = self._engine, self.args.process_index
        fragments = list_fragments(self.model, engine) if rank == 0 or is_sharded(engine) else []
        moved = [p for name, p in self.model.named_parameters() if self._moved is None or name in self._moved]
        weights = sum(getattr(p, "ds_numel", p.numel()) for p in moved) if rank == 0 else 0
        moments = 2 * sum(fragment.length for fragment in fragments)
        self._snapshot = Snapshot(4 * (weights + moments) + _ROOM_BYTES)

    @property
    def _engine(self) -> Any | None:
        return self.model_wrapped if self.is_deepspeed_enabled else None

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Save first where both are due: an evaluation that fails or is cut short then costs no training.

        That checkpoint has the best weights before it, and its own: with them the evaluation is done again, and decides
        the same.
        """
        if self.control.should_save:
            self._save_checkpoint(self.model, trial)
        metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if metrics and self._takes_best and self.find_standing().step == self.state.global_step:
            self._keep_best()
        return metrics

    def find_standing(self) -> Standing:
        """Return which evaluation is the best so far, and how long it has been waited for a better one."""
        return judge(self.state.log_history, self._metric, self._run.recipe.training.early_stopping_threshold)

    @property
    def chosen_step(self) -> int:
        """The step whose model is taken if training ends now: the best one's, or the last."""
        best = self.find_standing().step if self._takes_best else None
        return self.state.global_step if best is None else best

    def _keep_best(self) -> None:
        beat()
        with self._pace.pause():
            weights = gather_weights(self.model, self._engine, self._moved, partial(torch.Tensor.to, device="cpu"))
            if self.args.process_index == 0:
                self.best.keep(self.model, weights, whole=self._moved is None)
        beat()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Trainer calls this with our folder before it wraps the model, except under DeepSpeed."""
        read_weights(self.model, Path(resume_from_checkpoint), self._moved)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not checkpoint:
            return
        folder, engine, optimizer = Path(checkpoint), self._engine, find_optimizer(self.optimizer)
        fragments = list_fragments(self.model, engine)
        if engine is not None:
            read_engine_weights(self.model, engine, fragments, folder, self._moved)
        read_shards(optimizer, fragments, folder)
        read_engine(engine, optimizer, self.lr_scheduler, folder)
        self.samples = read_samples(self.args.process_index, folder)
        if self._takes_best and self.args.process_index == 0:
            self.best.take_from(folder)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint:
            read_scaler(self.accelerator.scaler, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint:
            rank = self.args.process_index
            read_random_state(rank, (self.args.seed, rank, self.state.global_step), Path(checkpoint))
