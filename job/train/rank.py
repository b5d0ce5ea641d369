"""What one rank does: load, train, hand checkpoints to the uploader, leave with a verdict.

The supervisor has set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; `attempt.json` in the run's
folder says which attempt this is and where to resume. The process group is gone when this returns.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.data.batching import derive_micro_batch
from job.data.tokenize import TokenTable
from job.errors import Diverged, Interrupted, ResourceExhausted
from job.recipe import Run
from job.store.background import BackgroundUploader
from job.store.commit import CheckpointWriter, RunStore
from job.store.models import count_parameters
from job.tasks import get_task, load_model
from job.train.engine import build_arguments, decide_precision, init_sharded_weights, join_group
from job.train.preemption import StopVote
from job.train.trainer import JobTrainer, TrainingData

log = logging.getLogger("job.train")


def run_rank(run: Run) -> dict[str, Any]:
    """Train this rank's share; return the numbers of the training. Raises Interrupted (75), Diverged (14), …"""
    attempt = run.read("attempt.json")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (run.folder / "train").mkdir(exist_ok=True)
    trainer, vote = _build_trainer(run, world_size)
    uploader = _start_uploader(run, attempt, rank, world_size)
    trainer.on_checkpoint = lambda folder, step: uploader.submit(folder)
    trainer.add_callback(Progress(uploader, trainer.args.process_index == 0))
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=attempt["resume"])
        if not vote.stopped:
            trainer._save_checkpoint(trainer.model, None)
    except torch.OutOfMemoryError:
        rows = trainer.args.per_device_train_batch_size
        raise ResourceExhausted(
            f"GPU memory is too small for {rows} rows at once; lower training.max_micro_batch_size "
            "(the global batch stays)"
        ) from None
    seconds = time.monotonic() - started
    uploader.close()
    _leave_group()
    if vote.stopped:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} with a committed checkpoint; run again to go on"
        )
    return _summarize(run, trainer, attempt, seconds)


def _build_trainer(run: Run, world_size: int) -> tuple[JobTrainer, StopVote]:
    recipe, data = run.recipe, run.read("data.json")
    task, training = get_task(recipe.task), recipe.training
    shape = derive_micro_batch(training.global_batch_size, world_size, training.max_micro_batch_size)
    precision = decide_precision(training.precision)
    # arguments and process group come before the model: under ZeRO-3 from_pretrained shards the weights as it loads
    args = build_arguments(recipe, shape, precision, run.folder / "train", count_parameters(run.base_model))
    join_group(args, world_size)
    model, new_weights = load_model(run.base_model, task, data["labels"], training.seed)
    init_sharded_weights(model, new_weights, training.seed)
    tables = TrainingData(
        TokenTable.open(run.tokens("train")), TokenTable.open(run.tokens("validation")), data["pad_id"], shape
    )
    transformers.set_seed(training.seed + args.process_index)
    trainer = JobTrainer(model, args, run, tables, task)
    trainer.remove_callback(transformers.PrinterCallback)
    vote = StopVote()
    trainer.add_callback(vote)
    if args.process_index == 0:
        log.info(
            "training on %d rank(s), %s, %s: %d rows, global batch %d = %d ranks × %d accumulation × %d rows",
            world_size, recipe.distributed.engine, precision, len(tables.train), shape.global_batch, world_size,
            shape.accumulation, shape.micro_batch,
        )  # fmt: skip
    return trainer, vote


def _start_uploader(run: Run, attempt: dict[str, Any], rank: int, world_size: int) -> BackgroundUploader:
    store = run.recipe.store
    writer = CheckpointWriter(RunStore(store.uri, run.run_id, allow_http=store.allow_http), rank, world_size, attempt)
    about = {"run_id": run.run_id, "world_size": world_size, "engine": run.recipe.distributed.engine}

    def upload(folder: Path) -> None:
        writer.commit(folder, int(folder.name.split("-")[1]), about)
        if rank == 0:
            _keep_weights(folder, run.final_model)
        shutil.rmtree(folder)

    return BackgroundUploader(upload, shutil.rmtree, store.max_unsynced_minutes * 60.0)


def _keep_weights(folder: Path, final: Path) -> None:
    """Keep the newest committed weights on this node, so that the next stages need not fetch them."""
    final.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        os.replace(folder / name, final / name)


class Progress(TrainerCallback):
    """One line per logging step on rank 0; stops on a loss that is no number and on upload errors."""

    def __init__(self, uploader: BackgroundUploader, speak: bool) -> None:
        self._uploader, self._speak = uploader, speak
        self._started, self._first_step = time.monotonic(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock at the step that training begins with."""
        self._started, self._first_step = time.monotonic(), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Check the loss, then speak."""
        self._uploader.check()
        logs = logs or {}
        loss = logs.get("loss", logs.get("train_loss", 0.0))
        if loss != loss or abs(loss) == float("inf"):
            raise Diverged(
                f"training.learning_rate: the loss is {loss} at step {state.global_step}; lower the rate, warm up "
                "longer, or use precision: fp32"
            )
        if self._speak and "loss" in logs:
            log.info("%s  loss %.4f  lr %.2e", self._where(state), logs["loss"], logs["learning_rate"])
        elif self._speak and "eval_accuracy" in logs:
            log.info("%s  validation accuracy %.4f", self._where(state), logs["eval_accuracy"])

    def _where(self, state: TrainerState) -> str:
        done = max(state.global_step - self._first_step, 1)
        left_s = (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)
        share = state.global_step / max(state.max_steps, 1)
        return f"step {state.global_step}/{state.max_steps} ({share:.0%}, {left_s // 60:.0f}:{left_s % 60:02.0f} left)"


def _leave_group() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _summarize(run: Run, trainer: JobTrainer, attempt: dict[str, Any], seconds: float) -> dict[str, Any]:
    table = TokenTable.open(run.tokens("train"))
    done = (
        max(trainer.state.global_step - attempt["resumed_from"], 1) if attempt["resume"] else trainer.state.global_step
    )
    share = done / max(trainer.state.global_step, 1)
    epochs = float(trainer.state.epoch or 0)
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "samples_per_second": round(len(table) * epochs * share / seconds, 1),
        "tokens_per_second": round(int(table.lengths.sum()) * epochs * share / seconds),
        "seconds": round(seconds, 1),
        "resumed_from": attempt["resumed_from"],
        "world_size": trainer.args.world_size,
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        # the log of a resumed attempt begins at its checkpoint, so it cannot vouch for the whole run
        "samples_sha256": None if attempt["resume"] else hash_samples(run.folder / "train"),
        "history": history,
    }


def hash_samples(folder: Path) -> str:
    """Return the sha256 (hex) over the global batches that ranks noted in `folder`: rows per step, sorted.

    The same recipe gives the same hash on any number of ranks.
    """
    steps: dict[int, list[int]] = {}
    for path in sorted(folder.glob("samples-rank-*.txt")):
        for line in path.read_text().splitlines():
            step, *rows = map(int, line.split())
            steps.setdefault(step, []).extend(rows)
    lines = [f"{step}:{','.join(map(str, sorted(rows)))}" for step, rows in sorted(steps.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
