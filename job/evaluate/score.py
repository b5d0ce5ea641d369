"""Running a model over a split, and the evaluate stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from job.data.tokenize import TokenTable
from job.evaluate.baselines import measure_baselines
from job.evaluate.intervals import wilson_interval
from job.recipe import Run
from job.tasks import TextClassification, get_task

log = logging.getLogger("job.evaluate")

TOKENS_PER_BATCH = 8192


def evaluate_run(run: Run) -> dict[str, Any]:
    """Measure the trained model on validation and test, and the baselines on test; write logits for the export.

    Leaves `evaluate/{validation,test}.npy`: float32 [rows, labels] of the fp32 torch model, rows in
    the split's order.
    """
    from transformers import AutoModelForSequenceClassification

    task = get_task(run.recipe.task)
    pad_id = run.read("data.json")["pad_id"]
    model = AutoModelForSequenceClassification.from_pretrained(run.final_model, use_safetensors=True)
    metrics: dict[str, Any] = {}
    for split in ("validation", "test"):
        table = TokenTable.open(run.tokens(split))
        started = time.monotonic()
        logits = compute_outputs(model, table, pad_id, lambda output, mask: output.logits)
        seconds = time.monotonic() - started
        _save(run.folder / "evaluate" / f"{split}.npy", logits)
        metrics[split] = score_logits(task, logits, np.asarray(table.labels))
        log.info("%s %s %.4f on %d rows", split, task.metric, metrics[split][task.metric], len(table))
    metrics["torch_seconds"] = round(seconds, 3)
    metrics["baselines"] = measure_baselines(run)
    return metrics


def score_logits(task: TextClassification, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the task's metrics of logits float [rows, labels] against labels int [rows], with a 95 % interval."""
    scores = task.score(logits, labels)
    return scores | {f"{task.metric}_interval": wilson_interval(scores[task.metric], len(labels))}


@torch.inference_mode()
def compute_outputs(
    model: Any, table: TokenTable, pad_id: int, read: Callable[[Any, torch.Tensor], torch.Tensor]
) -> np.ndarray:
    """Run `model` over a table in batches of like length; return `read(output, mask)`, float32 [rows, …], in order."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    order = np.argsort(-table.lengths, kind="stable")
    parts = []
    start = 0
    while start < len(order):
        size = max(TOKENS_PER_BATCH // int(table.lengths[order[start]]), 1)
        batch = {
            name: torch.from_numpy(array).to(device)
            for name, array in table.pad(order[start : start + size], pad_id).items()
        }
        parts.append(read(model(**batch), batch["attention_mask"]).float().cpu().numpy())
        start += size
    outputs = np.concatenate(parts)
    back = np.empty_like(outputs)
    back[order] = outputs
    return back


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array.astype(np.float32), allow_pickle=False)
