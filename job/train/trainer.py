"""transformers.Trainer with our global batches, loss and checkpoints.

What depends on Trainer's internals stands here and nowhere else: `_save_checkpoint` replaces its
save; its loaders are replaced by ours, so that accelerate does not shard a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

from job.data.batching import FILLER, BatchShape, RankBatches
from job.data.tokenize import TokenTable
from job.recipe import Run
from job.tasks import TextClassification
from job.tasks.text_classification import IGNORED_LABEL
from job.train.checkpoint import (
    STATE_FILE,
    gather_weights,
    read_optimizer,
    read_random_state,
    read_weights,
    write_optimizer,
    write_random_state,
    write_weights,
)


@dataclass(frozen=True)
class TrainingData:
    """Tokenized train and validation rows, the padding id, and how batches are shared."""

    train: TokenTable
    validation: TokenTable
    pad_id: int
    shape: BatchShape


class TableRows(Dataset[int]):
    """Positions of a token table; the collator looks the rows up, so that a batch is padded in one go."""

    def __init__(self, order: np.ndarray) -> None:
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> int:
        return FILLER if index == FILLER else int(self._order[index])


class Collator:
    """Positions → int64 tensors [rows, longest]; FILLER becomes a row that adds nothing to the loss."""

    def __init__(self, table: TokenTable, pad_id: int, with_rows: bool) -> None:
        self._table, self._pad_id, self._with_rows = table, pad_id, with_rows

    def __call__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        chosen = np.asarray(positions, dtype=np.int64)
        filler = chosen == FILLER
        chosen = np.where(filler, int(np.argmin(self._table.lengths)) if filler.any() else 0, chosen)
        batch = self._table.pad(chosen, self._pad_id)
        batch["labels"] = np.where(filler, IGNORED_LABEL, self._table.labels[chosen])
        if self._with_rows:
            batch["row"] = np.where(filler, FILLER, self._table.rows[chosen])
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


class EpochLoader(DataLoader[Any]):
    """A DataLoader whose batch sampler is told the epoch, as Trainer's loop expects."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler."""
        self.batch_sampler.set_epoch(epoch)


class JobTrainer(Trainer):
    """See the module. `save` receives (folder, step) of every checkpoint that was written."""

    def __init__(
        self, model: Any, args: TrainingArguments, run: Run, data: TrainingData, task: TextClassification
    ) -> None:
        self._run, self._data, self._task = run, data, task
        self.on_checkpoint: Callable[[Path, int], None] = lambda folder, step: None
        self.saved_step = -1
        smoothing = run.recipe.training.label_smoothing_factor

        def mean_loss(
            outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
        ) -> torch.Tensor:
            # the sum over this rank's rows over the count of the whole global batch
            count = num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED_LABEL).sum()
            return task.sum_loss(outputs.logits, labels, smoothing) / count

        super().__init__(
            model=model,
            args=args,
            eval_dataset=TableRows(np.argsort(-data.validation.lengths, kind="stable")),
            compute_loss_func=mean_loss,
            compute_metrics=self._score,
        )
        self._sample_log = (run.folder / "train" / f"samples-rank-{args.process_index:05d}.txt").open("w")

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's share of every global batch, already sharded."""
        table, training = self._data.train, self._run.recipe.training
        sampler = RankBatches(
            table.lengths, self._data.shape, self.args.process_index, training.seed, training.group_by_length
        )
        return EpochLoader(
            TableRows(np.arange(len(table))),
            batch_sampler=sampler,
            collate_fn=Collator(table, self._data.pad_id, with_rows=True),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return validation rows, longest first, sharded by accelerate."""
        loader: DataLoader[Any] = DataLoader(
            self.eval_dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=Collator(self._data.validation, self._data.pad_id, with_rows=False),
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Note which rows this rank computes, then compute them."""
        rows = inputs.pop("row").tolist()
        self._sample_log.write(f"{self.state.global_step} {' '.join(str(row) for row in rows if row != FILLER)}\n")
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _score(self, prediction: EvalPrediction) -> dict[str, Any]:
        return self._task.score(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write this rank's part of a checkpoint and hand the folder to `on_checkpoint`."""
        step, rank = self.state.global_step, self.args.process_index
        if step == self.saved_step:
            return
        folder = self._run.folder / "train" / f"checkpoint-{step:08d}-rank-{rank:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        self._sample_log.flush()
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        weights = gather_weights(self.model, engine)
        if rank == 0:
            write_weights(self.model, weights, self._run.tokenizer, folder)
            self._write_state(folder)
        if engine is not None:
            engine.save_checkpoint(str(folder))
        write_random_state(rank, folder)
        self.saved_step = step
        self.on_checkpoint(folder, step)

    def _write_state(self, folder: Path) -> None:
        self.state.save_to_json(str(folder / STATE_FILE))
        if not self.is_deepspeed_enabled:
            write_optimizer(self.optimizer.optimizer, self.lr_scheduler, self._parameter_names(), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Trainer calls this with our folder before it wraps the model."""
        read_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint and not self.is_deepspeed_enabled:
            read_optimizer(self.optimizer.optimizer, self.lr_scheduler, self._parameter_names(), Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """fp16's scale is found again within a few steps."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint:
            read_random_state(self.args.process_index, Path(checkpoint))

    def _parameter_names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.model.named_parameters()}
