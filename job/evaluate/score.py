"""The evaluate stage: the trained model and the baselines on the held-out rows."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from job.data import TokenTable, save_array
from job.evaluate.analysis import analyse_answers
from job.evaluate.baselines import measure_baselines
from job.evaluate.inference import compute_answers
from job.evaluate.writing import score_written, write_on
from job.recipe import Run
from job.tasks import get_task, open_trained

log = logging.getLogger("job.evaluate")


def evaluate_run(run: Run) -> dict[str, Any]:
    """Measure the trained model on validation and test, and the baselines on test; write answers for the export.

    Leaves `evaluate/{validation,test,sample}.npy`: the task's answers float32 [units, k] of the fp32 torch model, and
    `evaluate/analysis.json` for the report.
    """
    task, data = get_task(run.recipe.kind), run.read("data.json")
    model = open_trained(run.final_model, task)
    metrics: dict[str, Any] = {}
    for split in ("validation", "test"):
        table = TokenTable.open(run.tokens(split))
        started = time.monotonic()
        answers = compute_answers(model, table, data["pad_id"], task)
        seconds = time.monotonic() - started
        _save(run.folder / "evaluate" / f"{split}.npy", answers)
        metrics[split] = task.score(answers, table.truth)
        log.info("%s %s %.4f on %d rows", split, task.metric, metrics[split][task.metric], metrics[split]["n"])
    run.write("evaluate/analysis.json", analyse_answers(run, task, answers))
    if task.is_encoder_decoder:
        metrics["test"] |= score_written(run, model)
    if task.generates:
        run.write("evaluate/written.json", write_on(run, model))
    else:
        sample = compute_answers(model, TokenTable.open(run.tokens("sample")), data["pad_id"], task)
        _save(run.folder / "evaluate" / "sample.npy", sample)
    metrics["torch_seconds"] = round(seconds, 3)
    metrics["baselines"] = measure_baselines(run)
    return metrics


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_array(path, array.astype(np.float32))
