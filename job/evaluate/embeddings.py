"""Baselines of a model that reads, without a label head: what is near in the space of its embeddings.

Embeddings are mean-pooled last hidden states of the base model (Reimers & Gurevych 2019), of length 1.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from job.data import TokenTable, draw_shots
from job.evaluate.inference import compute_vectors, open_base
from job.recipe import Run

_PROBE_STEPS, _PROBE_DECAY = 100, 1e-4


class Neighbours:
    """Answers float32 [test rows, labels] by nearness; the test rows are embedded once."""

    def __init__(self, run: Run, train: TokenTable, test: TokenTable) -> None:
        self._run, self._train, self._test, self._data = run, train, test, run.read("data.json")

    def zero_shot(self) -> np.ndarray:
        """Answer the label whose name is nearest."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._run.tokenizer)
        ids = [np.asarray(tokenizer(name)["input_ids"]) for name in self._data["labels"]]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        nothing = np.zeros(len(ids), dtype=np.int64)
        return self._vectors @ self._embed(TokenTable(np.concatenate(ids), None, offsets, nothing, nothing)).T

    def few_shot(self, shots: int) -> np.ndarray:
        """Answer the label whose mean of `shots` train rows is nearest (Snell et al. 2017)."""
        rng = np.random.default_rng([self._run.recipe.training.seed, shots])
        chosen = draw_shots(self._train.labels, len(self._data["labels"]), shots, rng)
        vectors = self._embed(self._train.take(np.sort(np.concatenate(chosen))))
        labels = self._train.labels[np.sort(np.concatenate(chosen))]
        means = [vectors[labels == label].sum(axis=0) for label in range(len(chosen))]
        return self._vectors @ _unit(np.stack(means)).T

    def linear_probe(self) -> np.ndarray:
        """Answer by a logistic regression on the embeddings of all train rows (Alain & Bengio 2016)."""
        import torch

        inputs, labels = torch.from_numpy(self._embed(self._train)), torch.from_numpy(np.array(self._train.labels))
        weights = torch.zeros(inputs.shape[1] + 1, len(self._data["labels"]), requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=_PROBE_STEPS, line_search_fn="strong_wolfe")

        def measure_loss() -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(inputs @ weights[1:] + weights[0], labels)
            loss = loss + _PROBE_DECAY * weights[1:].square().sum()
            loss.backward()
            return loss

        optimizer.step(measure_loss)
        with torch.no_grad():
            return np.asarray((torch.from_numpy(self._vectors) @ weights[1:] + weights[0]).numpy())

    @cached_property
    def _vectors(self) -> np.ndarray:
        return self._embed(self._test)

    def _embed(self, table: TokenTable) -> np.ndarray:
        """Return unit vectors float32 [rows, hidden] of the base model."""
        import torch
        from transformers import AutoModel

        def pool(output: Any, mask: torch.Tensor) -> torch.Tensor:
            weights = mask.unsqueeze(-1).float()
            return (output.last_hidden_state * weights).sum(1) / weights.sum(1)

        return _unit(compute_vectors(open_base(AutoModel, self._run), table, self._data["pad_id"], pool))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))
