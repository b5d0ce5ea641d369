"""Running a torch model over a split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from job.data import TokenTable
from job.recipe import Run
from job.tasks import Task, join_outputs

_VECTOR_TOKENS = 8192

Read = Callable[[Any, np.ndarray, torch.Tensor], torch.Tensor]
"""(the model's output, positions of the rows, attention mask) → float [rows, …, k]."""


def compute_answers(model: Any, table: TokenTable, pad_id: int, task: Task) -> np.ndarray:
    """Return the task's answers float32 [units, k] of a torch model on a table, in its order."""

    def read(output: Any, positions: np.ndarray, mask: torch.Tensor) -> torch.Tensor:
        labels = torch.from_numpy(table.pad_labels(positions)).to(mask.device)
        return task.reduce(join_outputs(task, output), labels)

    return table.gather(_run_batches(model, table, pad_id, read, task.max_batch_tokens))


def compute_vectors(
    model: Any, table: TokenTable, pad_id: int, pool: Callable[[Any, torch.Tensor], torch.Tensor]
) -> np.ndarray:
    """Return `pool(output, mask)` of every row, float32 [rows, hidden], in order."""

    def read(output: Any, positions: np.ndarray, mask: torch.Tensor) -> torch.Tensor:
        return pool(output, mask)

    vectors = list(_run_batches(model, table, pad_id, read, _VECTOR_TOKENS))
    places = np.argsort(np.concatenate([positions for positions, _ in vectors]))
    return np.concatenate([part for _, part in vectors])[places]


def _run_batches(
    model: Any, table: TokenTable, pad_id: int, read: Read, max_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (positions, what `read` returns) of batches of like length, at most `max_tokens` each, longest first."""
    model = place_model(model)
    for positions in table.cut(np.arange(len(table)), max_tokens):
        arrays = table.pad(positions, pad_id)
        with torch.inference_mode():
            batch = {name: torch.from_numpy(array).to(model.device) for name, array in arrays.items()}
            answers = read(model(**batch), positions, batch["attention_mask"])
        yield positions, np.asarray(answers.float().cpu().numpy())


def place_model(model: Any) -> Any:
    """Return a model on this process's device, ready to answer."""
    return model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()


def open_base(auto_class: Any, run: Run) -> Any:
    """Return the model that a run starts from, opened by one of transformers' classes in fp32, and placed."""
    model = auto_class.from_pretrained(
        run.base_model, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
    )
    return place_model(model)
