"""The evaluate stage: the trained model and the baselines on the held-out rows."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from job.data.tokenize import TokenTable
from job.errors import GateFailed
from job.evaluate.baselines import measure_baselines
from job.evaluate.inference import compute_outputs, score_logits
from job.recipe import Run
from job.tasks import get_task

log = logging.getLogger("job.evaluate")


def evaluate_run(run: Run) -> dict[str, Any]:
    """Measure the trained model on validation and test, and the baselines on test; write logits for the export.

    Leaves `evaluate/{validation,test}.npy`: float32 [rows, labels] of the fp32 torch model, rows in
    the split's order.
    """
    from transformers import AutoModelForSequenceClassification

    task = get_task(run.recipe.task)
    pad_id = run.read("data.json")["pad_id"]
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        run.final_model, use_safetensors=True, output_loading_info=True
    )
    if loading["missing_keys"]:  # transformers would go on with random weights (peft #577)
        raise GateFailed(
            f"evaluate: the trained model lacks {sorted(loading['missing_keys'])[0]}; nothing is released, the "
            "checkpoint is kept"
        )
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


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array.astype(np.float32), allow_pickle=False)
