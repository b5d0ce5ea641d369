"""The current release of a model and the one to come, on the same test rows (`release.promote_if: better`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from job.data import load_tokenizer
from job.data.columns import Examples
from job.data.tokenize import TokenTable, tokenize_split
from job.errors import CheckpointMismatch
from job.evaluate.inference import compute_outputs
from job.recipe import Run
from job.store.models import fetch_model, read_config
from job.tasks import bound_mean, get_task

log = logging.getLogger("job.evaluate")


def compare_with_current(run: Run) -> dict[str, Any]:
    """Run the release that the run's current.json names; return gain, gain_bound (one-sided 95 %), n, both metrics.

    The current release reads the texts with its own tokenizer. What it answers counts by the name of the label; one
    that this run does not know is wrong. gain > 0: the new model is better; 0.01 is one point.
    Raises CheckpointMismatch (16) for a release that is not of this task.
    """
    release, task = run.read("current.json")["release"], get_task(run.recipe.task)
    folder = fetch_model(release, "main", run.cache, allow_http=run.recipe.store.allow_http).path
    labels = np.asarray(TokenTable.open(run.tokens("test")).labels)
    theirs = _answer(run, folder, labels)
    ours = np.load(run.folder / "evaluate" / "test.npy", allow_pickle=False)
    paired = task.per_row_score(ours, labels) - task.per_row_score(theirs, labels)
    gain, margin = bound_mean(paired)
    scores = {name: task.score(logits, labels)[task.metric] for name, logits in (("ours", ours), ("current", theirs))}
    return {"gain": round(gain, 6), "gain_bound": round(gain - margin, 6), "n": len(labels), "metric": scores}


def _answer(run: Run, folder: Path, labels: np.ndarray) -> np.ndarray:
    """Return float32 [rows, our labels] of the release in `folder`, -inf for a label that it does not know."""
    from transformers import AutoModelForSequenceClassification

    config, texts, data = read_config(folder), run.read("test.json"), run.read("data.json")
    if not str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification"):
        raise CheckpointMismatch(
            f"{folder.name}: the current release is no text classifier, so this one cannot be compared with it; "
            "use another name, or release.promote_if: proven"
        )
    tokenizer = load_tokenizer(folder, config)
    examples = Examples(texts["texts"], texts["pairs"], labels, np.arange(len(labels)))
    table = TokenTable.open(tokenize_split(examples, tokenizer, int(tokenizer.model_max_length), run.cache))
    model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
    logits = compute_outputs(model, table, int(tokenizer.pad_token_id), lambda output, mask: output.logits)
    named = np.full((len(logits), len(data["labels"]) + 1), -np.inf, dtype=np.float32)
    for column, name in model.config.id2label.items():
        place = data["labels"].index(name) if name in data["labels"] else -1  # the last: none of ours
        named[:, place] = np.maximum(named[:, place], logits[:, int(column)])
    return named
