"""Running a torch model over a split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from job.data import TokenTable
from job.tasks import Task, join_outputs

Read = Callable[[Any, np.ndarray, torch.Tensor], torch.Tensor]
"""(the model's output, positions of the rows, attention mask) → float [rows, …, k]."""


def compute_answers(model: Any, table: TokenTable, pad_id: int, task: Task) -> np.ndarray:
    """Return the task's answers float32 [units, k] of a torch model on a table, in its order."""

    def read(output: Any, positions: np.ndarray, mask: torch.Tensor) -> torch.Tensor:
        labels = torch.from_numpy(table.pad_labels(positions)).to(mask.device)
        return task.reduce(join_outputs(task, output), labels)

    return table.gather(
        _run_batches(partial(_run, place_model(model), table, pad_id, read), table, task.max_batch_tokens)
    )


def compute_vectors(
    model: Any, table: TokenTable, pad_id: int, pool: Callable[[Any, torch.Tensor], torch.Tensor]
) -> np.ndarray:
    """Return `pool(output, mask)` of every row, float32 [rows, hidden], in order."""

    def read(output: Any, positions: np.ndarray, mask: torch.Tensor) -> torch.Tensor:
        return pool(output, mask)

    vectors = list(_run_batches(partial(_run, place_model(model), table, pad_id, read), table, _VECTOR_TOKENS))
    places = np.argsort(np.concatenate([positions for positions, _ in vectors]))
    return np.concatenate([part for _, part in vectors])[places]


_VECTOR_TOKENS = 8192


def _run_batches(
    answer: Callable[[np.ndarray], np.ndarray], table: TokenTable, max_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (positions, answer(positions)) of batches of like length, at most `max_tokens` each, longest first."""
    return ((positions, answer(positions)) for positions in table.cut(np.arange(len(table)), max_tokens))


def place_model(model: Any) -> Any:
    """Return a model on this process's device, ready to answer."""
    return model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()


@torch.inference_mode()
def _run(model: Any, table: TokenTable, pad_id: int, read: Read, positions: np.ndarray) -> np.ndarray:
    batch = {name: torch.from_numpy(array).to(model.device) for name, array in table.pad(positions, pad_id).items()}
    answers = read(model(**batch), positions, batch["attention_mask"])
    return np.asarray(answers.float().cpu().numpy())
