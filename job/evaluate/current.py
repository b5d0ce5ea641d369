"""The current release of a model and the one to come, on the same test rows (`release.promote_if: better`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from job.data import TokenTable, load_tokenizer
from job.data.tokenize import Encoder, hash_tokenizer, tokenize_split
from job.errors import CheckpointMismatch
from job.evaluate.inference import compute_answers
from job.recipe import Run
from job.store.models import fetch_model, read_config
from job.tasks import Examples, Task, Truth, bound_mean, get_task, open_trained

log = logging.getLogger("job.evaluate")


def compare_with_current(run: Run) -> dict[str, Any]:
    """Run the release that the run's current.json names; return gain, gain_bound (one-sided 95 %), n, both metrics.

    It reads the texts with its own tokenizer, and what a classifier answers counts by the name of the label; one that
    this run does not know is wrong. Language models are compared token by token. gain > 0: the new model is better;
    0.01 is one point. Raises CheckpointMismatch (16) for a release that cannot be compared with this run's.
    """
    release, task = run.read("current.json")["release"], get_task(run.recipe.kind)
    folder = fetch_model(release, "main", run.cache, allow_http=run.recipe.store.allow_http).path
    _check_architecture(folder, task)
    table = TokenTable.open(run.tokens("test"))
    ours = np.load(run.folder / "evaluate" / "test.npy", allow_pickle=False)
    theirs, their_truth = _answer_current(run, folder, task, table)
    before, after = task.per_row_counts(theirs, their_truth), task.per_row_counts(ours, table.truth)
    paired = task.weigh_counts(before) - task.weigh_counts(after)
    loss, margin = bound_mean(paired, before != after)
    return {
        "gain": round(-loss, 6),
        "gain_bound": round(-loss - margin, 6),
        "n": len(paired),
        "metric": {
            "ours": task.score(ours, table.truth)[task.metric],
            "current": task.score(theirs, their_truth)[task.metric],
        },
    }


def _check_architecture(folder: Path, task: Task) -> None:
    config = read_config(folder)
    name = str((config.get("architectures") or [""])[0])
    kind = config.get("problem_type") or "single_label_classification"
    if not name.endswith(task.architectures) or kind != (task.problem_type or kind):
        known = f"{name} ({kind})" if task.problem_type and name else name or "model of unknown kind"
        raise CheckpointMismatch(
            f"{folder.name}: the current release is a {known}, no {task.name} model, so this "
            "one cannot be compared with it; use another name, or release.promote_if: proven"
        )


def _answer_current(run: Run, folder: Path, task: Task, table: TokenTable) -> tuple[np.ndarray, Truth]:
    """Return the answers of the model in `folder` to the test rows, and what they are held against.

    It reads the texts as its own tokenizer cuts them, unless the likelihood of tokens is the metric.
    """
    tokenizer, model = load_tokenizer(folder, read_config(folder), task), open_trained(folder, task)
    if task.per_token and not task.classifies:
        _check_tokenizer(run, folder, tokenizer)
    else:
        encoder = Encoder(task, tokenizer, int(tokenizer.model_max_length))
        table = TokenTable.open(tokenize_split(_read_examples(run), encoder, run.cache))
    answers = compute_answers(model, table, int(tokenizer.pad_token_id), task)
    if task.classifies:
        answers = _name_columns(answers, model.config.id2label, run.read("data.json")["labels"])
        if task.problem_type == "multi_label_classification":
            answers = answers[:, :-1]  # whether it says another label as well, no row asks
    return answers, table.truth


def _read_examples(run: Run) -> Examples:
    about, names = run.read("test.json"), tuple(run.read("data.json")["labels"])
    labels, rows = (np.array(about[key], dtype=np.int64) for key in ("labels", "rows"))
    return Examples(about["texts"], about["pairs"], labels, rows, 0, about["targets"], names)


def _name_columns(logits: np.ndarray, named: dict[int, str], labels: list[str]) -> np.ndarray:
    """Return float32 [units, our labels] and one more: what is none of ours; -inf for a label that it does not know."""
    ours = np.full((len(logits), len(labels) + 1), -np.inf, dtype=np.float32)
    for column, name in named.items():
        place = labels.index(name) if name in labels else -1
        ours[:, place] = np.maximum(ours[:, place], logits[:, int(column)])
    return ours


def _check_tokenizer(run: Run, folder: Path, theirs: Any) -> None:
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(run.tokenizer)
    if (hash_tokenizer(theirs), theirs.eos_token_id) != (hash_tokenizer(ours), ours.eos_token_id):
        raise CheckpointMismatch(
            f"{folder.name}: the current release has another tokenizer, so its tokens cannot be compared with this "
            "model's; use another name, or release.promote_if: proven"
        )
