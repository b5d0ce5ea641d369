"""Running a torch model over a split, and scoring what it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from job.data.tokenize import TokenTable
from job.tasks import TextClassification, wilson_interval

TOKENS_PER_BATCH = 8192


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
