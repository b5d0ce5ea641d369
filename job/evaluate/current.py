"""The current release of a model and the one to come, on the same test rows (`release.promote_if: better`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from job.data import TokenTable, load_tokenizer
from job.data.columns import Examples
from job.data.tokenize import Encoder, hash_tokenizer, tokenize_split
from job.errors import CheckpointMismatch
from job.evaluate.inference import compute_answers
from job.recipe import Run
from job.store.models import fetch_model, read_config
from job.tasks import Task, Truth, bound_mean, get_task, open_trained

log = logging.getLogger("job.evaluate")


def compare_with_current(run: Run) -> dict[str, Any]:
    """Run the release that the run's current.json names; return gain, gain_bound (one-sided 95 %), n, both metrics.

    A classifier reads the texts with its own tokenizer, and what it answers counts by the name of the label; one that
    this run does not know is wrong. Other models are compared token by token. gain > 0: the new model is better; 0.01
    is one point. Raises CheckpointMismatch (16) for a release that cannot be compared with this run's.
    """
    release, task = run.read("current.json")["release"], get_task(run.recipe.task)
    folder = fetch_model(release, "main", run.cache, allow_http=run.recipe.store.allow_http).path
    _check_architecture(folder, task)
    truth = TokenTable.open(run.tokens("test")).truth
    answer = _answer_by_name if task.classifies else _answer_by_token
    theirs, ours = answer(run, folder, task, truth), np.load(run.folder / "evaluate" / "test.npy", allow_pickle=False)
    gain, margin = bound_mean(task.per_row_score(ours, truth) - task.per_row_score(theirs, truth))
    scores = {name: task.score(answers, truth)[task.metric] for name, answers in (("ours", ours), ("current", theirs))}
    return {
        "gain": round(gain, 6),
        "gain_bound": round(gain - margin, 6),
        "n": len(np.unique(truth.rows)),
        "metric": scores,
    }


def _check_architecture(folder: Path, task: Task) -> None:
    name = str((read_config(folder).get("architectures") or [""])[0])
    if not name.endswith(task.architectures):
        raise CheckpointMismatch(
            f"{folder.name}: the current release is a {name or 'model of unknown kind'}, no {task.name} model, so this "
            "one cannot be compared with it; use another name, or release.promote_if: proven"
        )


def _answer_by_name(run: Run, folder: Path, task: Task, truth: Truth) -> np.ndarray:
    """Return float32 [rows, our labels] of the classifier in `folder`, -inf for a label that it does not know."""
    texts, data = run.read("test.json"), run.read("data.json")
    tokenizer = load_tokenizer(folder, read_config(folder), task)
    examples = Examples(texts["texts"], texts["pairs"], truth.labels, truth.rows)
    encoder = Encoder(task, tokenizer, int(tokenizer.model_max_length))
    table, model = TokenTable.open(tokenize_split(examples, encoder, run.cache)), open_trained(folder, task)
    logits = compute_answers(model, table, int(tokenizer.pad_token_id), task)
    named = np.full((len(logits), len(data["labels"]) + 1), -np.inf, dtype=np.float32)
    for column, name in model.config.id2label.items():
        place = data["labels"].index(name) if name in data["labels"] else -1  # the last: none of ours
        named[:, place] = np.maximum(named[:, place], logits[:, int(column)])
    return named


def _answer_by_token(run: Run, folder: Path, task: Task, truth: Truth) -> np.ndarray:
    """Return the answers of the model in `folder` to this run's own tokens, which must be its tokens too."""
    from transformers import AutoTokenizer

    theirs, ours = load_tokenizer(folder, read_config(folder), task), AutoTokenizer.from_pretrained(run.tokenizer)
    if (hash_tokenizer(theirs), theirs.eos_token_id) != (hash_tokenizer(ours), ours.eos_token_id):
        raise CheckpointMismatch(
            f"{folder.name}: the current release has another tokenizer, so its tokens cannot be compared with this "
            "model's; use another name, or release.promote_if: proven"
        )
    table = TokenTable.open(run.tokens("test"))
    return compute_answers(open_trained(folder, task), table, run.read("data.json")["pad_id"], task)
