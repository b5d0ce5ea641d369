"""What the model would score without fine-tuning, on the same test rows.

`majority` always answers the most frequent train label, or set of labels · `mean` the mean of train labels ·
`untrained` is the base model with its head as it stood before the first step · `zero-shot` takes the label by its
name: the nearest embedding, the likeliest continuation of a model that writes, or what a model of natural-language
inference says that the text entails · `few-shot:N` (`one-shot` is N = 1) is shown N train rows a label: the nearest
mean embedding, or examples before the question · `linear-probe` is a logistic regression on the embeddings of all
train rows.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import numpy as np

from job.data import TokenTable
from job.evaluate.embeddings import Neighbours
from job.evaluate.entailment import find_entailment, score_entailment
from job.evaluate.inference import compute_answers
from job.evaluate.prompting import Prompter
from job.evaluate.writing import score_written
from job.recipe import Run
from job.store.models import read_config
from job.tasks import Units, find_head, get_task, load_model

log = logging.getLogger("job.evaluate")


def measure_baselines(run: Run) -> dict[str, dict[str, Any]]:
    """Return the task's metrics of every baseline of the recipe on the test split."""
    task, baselines = get_task(run.recipe.kind), Baselines(run)
    measured = {}
    for name in run.recipe.baselines:
        measured[name] = task.score(baselines.answer(name), baselines.test.truth)
        if task.is_encoder_decoder:  # whose one baseline is the model as it was
            measured[name] |= score_written(run, baselines.load_untrained())
        log.info("baseline %s: %s %.4f", name, task.metric, measured[name][task.metric])
    return measured


class Baselines:
    """Answers float32 [units, k] on the test split by name; it is embedded once."""

    def __init__(self, run: Run) -> None:
        self._run, self._task, self._data = run, get_task(run.recipe.kind), run.read("data.json")
        self.test, self._train = TokenTable.open(run.tokens("test")), TokenTable.open(run.tokens("train"))

    def answer(self, name: str) -> np.ndarray:
        """Return the answers of one baseline."""
        kind, _, shots = name.partition(":")
        if kind in ("one-shot", "few-shot"):
            return self._shown.few_shot(int(shots or 1))
        known = {"majority": self._majority, "mean": self._mean, "untrained": self._untrained}
        return (known | {"zero-shot": self._zero_shot, "linear-probe": self._linear_probe})[kind]()

    def _majority(self) -> np.ndarray:
        if self._train.labels.ndim > 1:
            sets, counts = np.unique(self._train.labels, axis=0, return_counts=True)
            return np.tile(2 * sets[counts.argmax()] - 1, (len(self.test), 1))
        counts = np.bincount(self._train.truth.labels, minlength=len(self._data["labels"]))
        return np.tile(counts.astype(np.float32), (len(self.test.unit_positions), 1))

    def _mean(self) -> np.ndarray:
        mean = np.full((len(self.test), 1), self._train.labels.mean(dtype=np.float64))
        return np.asarray(self._task.reduce(mean, self.test.truth.labels))

    def load_untrained(self) -> Any:
        """Return the model before training."""
        seed, labels = self._run.recipe.training.seed, self._data["labels"]
        model, new_weights = load_model(self._run.base_model, self._task, labels, seed)
        if self._task.standardizes:
            name, head = find_head(model)
            if f"{name}.weight" in new_weights:
                Units.measure(self._train.labels, head).leave(head)
        return model

    def _untrained(self) -> np.ndarray:
        return compute_answers(self.load_untrained(), self.test, self._data["pad_id"], self._task)

    def _zero_shot(self) -> np.ndarray:
        entailment = find_entailment(self._config)
        if entailment is not None:
            return score_entailment(self._run, self.test, entailment)
        return self._shown.zero_shot()

    def _linear_probe(self) -> np.ndarray:
        return Neighbours(self._run, self._train, self.test).linear_probe()

    @cached_property
    def _shown(self) -> Neighbours | Prompter:
        """Return what a few examples can be shown to: a model that writes, or the space of one that reads."""
        writes = str((self._config.get("architectures") or [""])[0]).endswith(get_task("causal-lm").architectures)
        return (Prompter if writes else Neighbours)(self._run, self._train, self.test)

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_config(self._run.base_model)
