"""What one rank does: load, train, hand checkpoints to the uploader, leave with a verdict.

The supervisor has set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; `attempt.json` in the run's
folder says which attempt this is and where to resume. The process group is gone when this returns.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from transformers.integrations import is_deepspeed_zero3_enabled

from job.data.batching import derive_micro_batch
from job.data.tokenize import TokenTable
from job.errors import Interrupted
from job.liveness import beat
from job.recipe import Run, write_json
from job.store.background import BackgroundUploader
from job.store.checkpoints import CheckpointWriter
from job.store.models import count_parameters
from job.store.runs import RunStore
from job.tasks import get_task, load_model, weigh_labels
from job.train.attention import choose_attention
from job.train.checkpoint import BEST_FILE
from job.train.engine import build_arguments, check_gpus, decide_precision, init_sharded_weights, join_group
from job.train.failures import explain_failures
from job.train.fragments import WEIGHTS_FILE
from job.train.methods import apply_method, count_trained
from job.train.packing import check_packing
from job.train.preemption import EvaluationCut, EvaluationDebt, StopVote, ToldTwice
from job.train.progress import Heartbeat, Progress, ScaleFloor
from job.train.selection import EarlyStopping, EndedEarly
from job.train.snapshot import Written
from job.train.stream import seed_rank
from job.train.trainer import JobTrainer, TrainingData
from job.train.units import enter_units

log = logging.getLogger("job.train")


def run_rank(run: Run) -> dict[str, Any]:
    """Train this rank's share; return the numbers of the training. Raises Interrupted (75), Diverged (14), …"""
    try:
        with explain_failures():
            return _run_rank(run)
    except ToldTwice:
        raise Interrupted("told twice to stop; the last committed checkpoint stays, run again to go on") from None


def _run_rank(run: Run) -> dict[str, Any]:
    attempt = run.read("attempt.json")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (run.folder / "train").mkdir(exist_ok=True)
    trainer, group = _build_trainer(run, world_size)
    uploads = Uploads(run, attempt, rank, world_size)
    vote = StopVote(group, uploads.queue)
    _add_callbacks(run, trainer, vote, uploads.queue)
    trainer.on_checkpoint = uploads.submit
    seconds = _train(trainer, vote, attempt)
    # before the last upload: a rank that has little to send would wait for the others without a sign of life
    samples = trainer.samples.sum_over_ranks(group)
    _leave_group()
    uploads.queue.close(on_wait=beat)
    step = trainer.state.global_step
    if vote.stopped or vote.told:  # perhaps after the last step: the supervisor may not know of it, and would go on
        raise Interrupted(f"stopped at step {step} with a committed checkpoint; run again to go on", together=True)
    if rank == 0 and trainer.chosen_step != step:
        trainer.best.place(run.trained)
    return _summarize(run, trainer, attempt, seconds) | {"samples_sha256": samples[0], "samples": samples[1]}


def _train(trainer: JobTrainer, vote: StopVote, attempt: dict[str, Any]) -> float:
    """Train to the end or to where the vote stops it, with a checkpoint of that step; return the seconds."""
    started = time.monotonic()
    trainer.resumed_from = attempt["resumed_from"] if attempt["resume"] else -1
    with explain_failures(lambda: trainer.shape):
        try:
            trainer.train(resume_from_checkpoint=attempt["resume"])
        except EvaluationCut:
            return time.monotonic() - started
        except EndedEarly:
            pass  # an attempt before had done all that there was to do, but for the end
        if not vote.stopped:
            trainer.save()
    return time.monotonic() - started


def _build_trainer(run: Run, world_size: int) -> tuple[JobTrainer, Any]:
    """Return the trainer and a CPU group of all ranks (None for one)."""
    recipe, data = run.recipe, run.read("data.json")
    task, training = get_task(recipe.kind), recipe.training
    check_gpus()
    shape = derive_micro_batch(training.global_batch_size, world_size, training.max_micro_batch_size)
    precision = decide_precision(training.precision, run.base_model)
    # arguments and process group come before the model: under ZeRO-3 from_pretrained shards the weights as it loads
    args = build_arguments(recipe, shape, precision, run.folder / "train", count_parameters(run.base_model))
    join_group(args, world_size)
    model, new_weights = load_model(run.base_model, task, data["labels"], training.seed)
    init_sharded_weights(model, new_weights, training.seed)
    apply_method(model, recipe.tuning, training.seed)
    train, validation = (TokenTable.open(run.tokens(split)) for split in ("train", "validation"))
    weights = None
    if training.class_weights is not None:
        weights = weigh_labels(training.class_weights, data["labels"], np.asarray(train.labels))
    # rows of like length are hardly padded: encoders were as fast on an H200 as with rows end to end, or faster
    asked = "padded" if training.attention == "auto" and training.group_by_length else training.attention
    if asked != "padded" and not is_deepspeed_zero3_enabled():
        model.to(args.device)  # as Trainer or DeepSpeed does later: the answers of its kernels are compared
    flat = choose_attention(asked, precision, model, task, train)
    tables = TrainingData(train, validation, data["pad_id"], data["max_length"], shape, weights, flat)
    if training.packing and not flat:
        check_packing(model, tables.train, tables.pad_id)
    if task.standardizes:
        tables = enter_units(model, new_weights, tables)
    trainer = JobTrainer(model, args, run, tables, task)
    # DeepSpeed has its own ways to add up, and this would hold whole gradients where each rank is to hold a part; a
    # compiler would choose slower kernels, and what it makes in another attempt may add up otherwise all the same
    can_repeat = torch.cuda.is_available() and not (trainer.is_deepspeed_enabled or training.torch_compile)
    trainer.repeats = can_repeat and trainer.try_repeating()
    seed_rank(training.seed, args.process_index, 0)  # after Trainer, which seeds every rank alike
    if args.process_index == 0:
        log.info(
            "training %d weights on %d rank(s), %s, %s, %s: %d rows, global batch %d = %d ranks × %d accumulation × "
            "%d rows",
            count_trained(model), world_size, recipe.distributed.engine, precision, trainer.attention,
            len(tables.train), shape.global_batch, world_size, shape.accumulation, shape.micro_batch,
        )  # fmt: skip
    return trainer, dist.new_group(backend="gloo") if world_size > 1 else None


def _add_callbacks(run: Run, trainer: JobTrainer, vote: StopVote, queue: BackgroundUploader) -> None:
    trainer.remove_callback(transformers.PrinterCallback)
    tell = partial(write_json, run.progress) if trainer.args.process_index == 0 else None
    progress = Progress(queue.check, trainer.task.metric, tell)
    stopping = EarlyStopping(trainer.find_standing, run.recipe.training)
    debt = EvaluationDebt(run.recipe.training.watches_metric)
    for callback in (Heartbeat(), progress, ScaleFloor(trainer.read_loss_scale), stopping, vote, debt):
        trainer.add_callback(callback)


class Uploads:
    """This rank's queue of written checkpoints, each committed in the background."""

    def __init__(self, run: Run, attempt: dict[str, Any], rank: int, world_size: int) -> None:
        store = run.recipe.store
        self._run, self._rank = run, rank
        self._writer = CheckpointWriter(RunStore.of(run), rank, world_size, attempt)
        self._about = attempt.get("about", {}) | {"run_id": run.run_id, "world_size": world_size}
        self._written: dict[Path, Future[Written]] = {}
        self.queue = BackgroundUploader(
            self._upload, self._discard, store.max_unsynced_minutes * 60.0, in_step=world_size > 1
        )

    def submit(self, folder: Path, written: Future[Written]) -> None:
        """Queue a checkpoint that is being written."""
        self._written[folder] = written
        self.queue.submit(folder)

    def _upload(self, folder: Path) -> None:
        written = self._written[folder].result()
        began, held = time.monotonic(), {file.path.name: file for file in written.held}
        self._writer.commit(folder, int(folder.name.split("-")[1]), self._about, held)
        if self._rank == 0:
            seconds = written.seconds + time.monotonic() - began
            # the supervisor keeps so much time in reserve before its deadline
            self._run.write("reserve.json", {"seconds": round(seconds, 3)})
            _keep_weights(folder, self._run.trained)
        self._discard(folder)

    def _discard(self, folder: Path) -> None:
        written = self._written.pop(folder)
        if not written.exception():
            for file in written.result().held:
                file.drop()
        shutil.rmtree(folder)


def _keep_weights(folder: Path, final: Path) -> None:
    """Keep the newest committed weights on this node, so that the next stages need not fetch them."""
    final.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        os.replace(folder / name, final / name)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _measure_peak() -> int:
    """Return the most memory that this rank has held: of its GPU, or of the host where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _summarize(run: Run, trainer: JobTrainer, attempt: dict[str, Any], seconds: float) -> dict[str, Any]:
    table, state = TokenTable.open(run.tokens("train")), trainer.state
    done = max(state.global_step - attempt["resumed_from"], 1) if attempt["resume"] else state.global_step
    epochs = float(state.epoch or 0) * done / max(state.global_step, 1)
    history = [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]
    return {
        "steps": state.global_step,
        "model_step": trainer.chosen_step,
        "weights_file": WEIGHTS_FILE if trainer.chosen_step == state.global_step else BEST_FILE,
        "stopped_by": "early stopping" if state.global_step < state.max_steps else "the last step",
        "trainable_parameters": count_trained(trainer.model),
        "samples_per_second": round(len(table) * epochs / seconds, 1),
        "tokens_per_second": round(int(table.lengths.sum()) * epochs / seconds),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": _measure_peak(),
        "resumed_from": attempt["resumed_from"],
        "world_size": trainer.args.world_size,
        "class_weights": trainer.name_class_weights(run.read("data.json")["labels"]),
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "attention": trainer.attention,
        "compiled": run.recipe.training.torch_compile,
        "history": history,
    }
