"""transformers.Trainer with our global batches and loss; its checkpoints are ours by `saving.py`.

What depends on Trainer's internals stands in these two files and nowhere else; its loaders are replaced by ours, so
that accelerate does not shard a second time.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainingArguments

from job.data.batching import FILLER, BatchShape, RankBatches
from job.data.tokenize import AS_LONGEST, TokenTable, Widths
from job.recipe import Run
from job.tasks import Task, join_outputs
from job.train.engine import repeat_bits
from job.train.methods import group_weights, list_frozen
from job.train.packing import PackedCollator
from job.train.preemption import EvaluationCut
from job.train.saving import SavingTrainer
from job.train.stream import Collator, SeededBatches, TableRows, keep_generators, load_batches
from job.train.varlen import FlatRows

log = logging.getLogger("job.train")

_COMPILED_WIDTHS = 8
"""Rows are padded to a multiple of so many tokens where the model is compiled: attention on a GPU wants a mask whose
lines are multiples of 8 numbers, and torch compiles once for masks that are so and again for those it must fill."""


@dataclass(frozen=True)
class TrainingData:
    """Tokenized train and validation rows, the padding id, tokens of a row at most, and how batches are shared.

    `class_weights`: what each label counts in the loss, float32 [labels]; None: all alike.
    `flat`: how train rows are computed end to end, None where they are padded or packed.
    """

    train: TokenTable
    validation: TokenTable
    pad_id: int
    max_length: int
    shape: BatchShape
    class_weights: np.ndarray | None = None
    flat: FlatRows | None = None


class JobTrainer(SavingTrainer):
    """See the module. `repeats`: a step is computed with the same bits every time; a processor does so by itself."""

    def __init__(self, model: Any, args: TrainingArguments, run: Run, data: TrainingData, task: Task) -> None:
        self._data, self.task, self.repeats, self.shape = data, task, False, (0, 0)
        self._order = np.argsort(-data.validation.lengths, kind="stable")
        self._frozen = list_frozen(model, run.recipe.tuning)
        smoothing, weights = run.recipe.training.label_smoothing_factor, data.class_weights
        self._class_weights = torch.from_numpy(weights).to(args.device) if weights is not None else None

        def mean_loss(
            outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
        ) -> torch.Tensor:
            # the sum over this rank's rows over the count of the whole global batch
            count = num_items_in_batch
            if count is None:
                count = task.count_loss(labels, self._class_weights)
            return task.sum_loss(join_outputs(task, outputs), labels, smoothing, self._class_weights) / count

        super().__init__(
            run,
            task.metric,
            model=model,
            args=args,
            eval_dataset=TableRows(self._order),
            compute_loss_func=mean_loss,
            compute_metrics=self._score,
            preprocess_logits_for_metrics=self._reduce,
        )

    @property
    def attention(self) -> str:
        """How train rows are computed: varlen, packed or padded."""
        return "varlen" if self._data.flat else "packed" if self._run.recipe.training.packing else "padded"

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's share of every global batch, already sharded."""
        table, training = self._data.train, self._run.recipe.training
        sampler = RankBatches(
            table.lengths, self._data.shape, self.args.process_index, training.seed, training.group_by_length
        )
        redraw = partial(self.task.redraw, table.about) if self.task.redraws else None
        rows = SeededBatches(TableRows(np.arange(len(table))), self._collator, training.seed, redraw)
        return load_batches(rows, sampler, self.args.dataloader_num_workers, self.args.dataloader_pin_memory)

    @property
    def _collator(self) -> Any:
        if self._data.flat:
            return self._data.flat.collate(self._data.train)
        if self._run.recipe.training.packing:
            return PackedCollator(self._data.train, self._data.pad_id, self._data.max_length)
        compiled = self._run.recipe.training.torch_compile
        widths = Widths(_COMPILED_WIDTHS, self._data.max_length) if compiled else AS_LONGEST
        return Collator(self._data.train, self._data.pad_id, with_rows=True, widths=widths)

    def try_repeating(self) -> bool:
        """Compute the shortest rows; tell whether every kernel of this model can add up in one order."""
        few = np.argsort(self._data.train.lengths, kind="stable")[:2]
        batch = self._collator(few.tolist())
        device, half = self.args.device, torch.bfloat16 if self.args.bf16 else torch.float16
        mixed = torch.autocast(device.type, half, enabled=self.args.bf16 or self.args.fp16)
        del batch["row"]
        try:
            with keep_generators(), repeat_bits(True), mixed, self._lay_out(batch) as kept:
                labels = kept.pop("labels").to(device)
                outputs = self.model.train()(**self._prepare_inputs(kept))
                self.task.sum_loss(join_outputs(self.task, outputs), labels, 0.0).backward()
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            log.warning("on a GPU this model has other bits each time, also when it goes on: %s", str(error)[:120])
            return False
        finally:
            self.model.zero_grad()
        return True

    def _lay_out(self, batch: dict[str, Any]) -> Any:
        flat = self._data.flat
        return flat.apart(batch, self.args.device) if flat else nullcontext(batch)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return validation rows, longest first, sharded by accelerate."""
        loader: DataLoader[Any] = DataLoader(
            self.eval_dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=Collator(self._data.validation, self._data.pad_id, with_rows=False),
            generator=torch.Generator(),
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Note which rows this rank computes, and how many of how many tokens, then compute them."""
        rows = inputs.pop("row")
        self.samples.add(self.state.global_step, rows.tolist())
        mask = inputs.get("attention_mask")  # packed rows have none, and hardly any padding
        self._pace.add(inputs["input_ids"].numel() if mask is None else int(mask[rows != FILLER].sum()))
        flat = self._data.flat
        self.shape = (len(rows), flat.measure_longest(inputs) if flat else inputs["input_ids"].shape[1])
        with repeat_bits(self.repeats), self._lay_out(inputs) as kept:
            loss: torch.Tensor = super().training_step(model, kept, num_items_in_batch)
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Return what the loss of a whole global batch is divided by: the number of its labels, or what they weigh.

        Trainer's count goes to the GPU, which would have to be idle for that, and transformers 5 leaves out the first
        label of every line. Weights are added up in fp64, so that it hardly depends on how many share the batch.
        """
        if not batch_samples:  # Trainer asks once more at the end of an epoch
            return None
        weights = self._data.class_weights  # not those on the GPU, which would have to be waited for
        weights = None if weights is None else torch.from_numpy(weights).double()
        count = torch.stack([self.task.count_loss(batch["labels"].cpu(), weights) for batch in batch_samples]).sum()
        if self.args.world_size > 1:  # filled there, not copied, for which the GPU would have to be waited for
            count = torch.full((), count.item(), dtype=count.dtype, device=device)
            count = self.accelerator.gather(count).sum()
        return count if weights is None else count.float()

    def _prepare_input(self, data: Any) -> Any:
        """As Trainer's, but what lies in pinned memory is not waited for."""
        if torch.is_tensor(data) and data.is_pinned() and not self.is_deepspeed_enabled:
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def create_optimizer(self) -> torch.optim.Optimizer:
        """As Trainer's, with a group of weights for each depth where learning rates differ by layer."""
        if self.optimizer is None:  # Trainer calls again once DeepSpeed has wrapped it
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decayed = set(self.get_decay_parameter_names(self.model))
            self.optimizer = kind(group_weights(self.model, self._run.recipe.training, decayed), **options)
        return self.optimizer

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, but what is frozen has no dropout."""
        if model.training:
            for module in self._frozen:
                module.eval()
        return super().compute_loss(model, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without a trace in the random number generators; a stop signal ends it and the training."""
        try:
            with keep_generators(), self._pace.pause():
                metrics: dict[str, float] = super().evaluate(*args, **kwargs)
                return metrics
        except EvaluationCut:
            if self.args.eval_on_start and self.state.global_step == max(self.resumed_from, 0):
                raise  # nothing was trained since the checkpoint, which stays the newest
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def _reduce(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Return the task's answers of a batch; Trainer gives one output as it is, several in the model's order."""
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        named = dict(zip(self.task.outputs, parts, strict=False))
        answers: torch.Tensor = self.task.reduce(join_outputs(self.task, named), labels)
        return answers

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the tokens that all ranks trained on in a second since the last time."""
        pace = {"tokens_per_second": self._pace.take()} if "loss" in logs else {}
        super().log(logs | pace, start_time)

    def _score(self, prediction: EvalPrediction) -> dict[str, Any]:
        """Score all rows together; Trainer has filled short ones up to the longest of all."""
        table, answers = self._data.validation, np.asarray(prediction.predictions)
        order = self._order
        if table.per_token:
            lengths = table.label_lengths
            rows = [row[None, : lengths[place]] for row, place in zip(answers, order, strict=True)]
        else:
            rows = list(answers[:, None])
        return self.task.score(table.gather(zip(order[:, None], rows, strict=True)), table.truth)

    def name_class_weights(self, names: list[str]) -> dict[str, float] | None:
        """Return label → what it counts in the loss, None where all count alike."""
        weights = self._data.class_weights
        return None if weights is None else dict(zip(names, weights.astype(float).round(4).tolist(), strict=True))

    def read_loss_scale(self) -> float | None:
        """Return what fp16's scaler multiplies the loss with now, None without a scaler."""
        scaler = self.accelerator.scaler
        return float(scaler.get_scale()) if scaler is not None else None
