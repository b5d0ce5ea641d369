"""What the model would score without fine-tuning, on the same test rows.

`majority` always answers the most frequent train label · `untrained` is the base model with its
head as it stood before the first step · `zero-shot` takes the label whose name's embedding is
nearest · `few-shot:N` (`one-shot` is N = 1) the nearest mean embedding of N train rows a label.
Embeddings are mean-pooled last hidden states of the base model (Reimers & Gurevych 2019).
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import numpy as np

from job.data import TokenTable
from job.evaluate.inference import compute_answers, compute_vectors
from job.recipe import Run
from job.tasks import get_task, load_model

log = logging.getLogger("job.evaluate")


def measure_baselines(run: Run) -> dict[str, dict[str, Any]]:
    """Return the task's metrics of every baseline of the recipe on the test split."""
    task, baselines = get_task(run.recipe.kind), Baselines(run)
    measured = {}
    for name in run.recipe.baselines:
        measured[name] = task.score(baselines.answer(name), baselines.test.truth)
        log.info("baseline %s: %s %.4f", name, task.metric, measured[name][task.metric])
    return measured


class Baselines:
    """Answers float32 [units, k] on the test split by name; it is embedded once."""

    def __init__(self, run: Run) -> None:
        self._run, self._data = run, run.read("data.json")
        self.test, self._train = TokenTable.open(run.tokens("test")), TokenTable.open(run.tokens("train"))

    def answer(self, name: str) -> np.ndarray:
        """Return the answers of one baseline."""
        kind, _, shots = name.partition(":")
        if kind in ("one-shot", "few-shot"):
            return self._test_vectors @ self._class_means(int(shots or 1)).T
        return {"majority": self._majority, "untrained": self._untrained, "zero-shot": self._zero_shot}[kind]()

    def _majority(self) -> np.ndarray:
        counts = np.bincount(self._train.truth.labels, minlength=len(self._data["labels"]))
        return np.tile(counts.astype(np.float32), (len(self.test.unit_positions), 1))

    def _untrained(self) -> np.ndarray:
        seed, task = self._run.recipe.training.seed, get_task(self._run.recipe.kind)
        model, _ = load_model(self._run.base_model, task, self._data["labels"], seed)
        return compute_answers(model, self.test, self._data["pad_id"], task)

    def _zero_shot(self) -> np.ndarray:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._run.tokenizer)
        ids = [np.asarray(tokenizer(name)["input_ids"]) for name in self._data["labels"]]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        nothing = np.zeros(len(ids), dtype=np.int64)
        return self._test_vectors @ self._embed(TokenTable(np.concatenate(ids), None, offsets, nothing, nothing)).T

    def _class_means(self, shots: int) -> np.ndarray:
        rng = np.random.default_rng([self._run.recipe.training.seed, shots])
        labels = range(len(self._data["labels"]))
        chosen = [rng.permutation(np.flatnonzero(self._train.labels == label))[:shots] for label in labels]
        vectors = self._embed(self._train.take(np.concatenate(chosen)))
        parts = np.split(vectors, np.cumsum([len(part) for part in chosen])[:-1])
        return _unit(np.stack([part.mean(axis=0) if len(part) else np.zeros(vectors.shape[1]) for part in parts]))

    @cached_property
    def _test_vectors(self) -> np.ndarray:
        return self._embed(self.test)

    def _embed(self, table: TokenTable) -> np.ndarray:
        """Return unit vectors float32 [rows, hidden] of the base model."""
        import torch
        from transformers import AutoModel

        def pool(output: Any, mask: torch.Tensor) -> torch.Tensor:
            weights = mask.unsqueeze(-1).float()
            return (output.last_hidden_state * weights).sum(1) / weights.sum(1)

        folder = self._run.base_model
        model = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
        return _unit(compute_vectors(model, table, self._data["pad_id"], pool))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))
