"""What a training step reads back from the device: each is a wait for all that the device was told to compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from job.tasks import IGNORED_LABEL, get_task

ROWS, TOKENS, LABELS = 4, 6, 3
WORDS = torch.tensor([[0, 1, 2, 0, IGNORED_LABEL, IGNORED_LABEL]]).repeat(ROWS, 1)
SETS = torch.tensor([[0.0, 1.0, 1.0]]).repeat(ROWS, 1)
WINDOW = 1 << 45 | 5 << 30 | 2 << 15 | 3  # the context is tokens 1 to 5, the answer 2 and 3
CASES = {
    "text-classification": ((ROWS, LABELS), torch.tensor([0, 2, 1, 0])),
    "text-classification:multi_label_classification": ((ROWS, LABELS), SETS),
    "text-classification:regression": ((ROWS, 1), torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "token-classification": ((ROWS, TOKENS, LABELS), WORDS),
    "question-answering": ((ROWS, TOKENS, 2), torch.tensor([WINDOW] * ROWS)),
}


class ReadsBack(TorchDispatchMode):
    """Notes what needs a value, or the size of a result that depends on values: a number, an index by a mask."""

    WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.index.Tensor")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += [str(func)] if str(func).startswith(self.WAITING) else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", CASES)
def test_a_loss_reads_nothing_back_and_a_row_that_fills_up_a_batch_adds_nothing(kind: str, smoothing: float) -> None:
    task, (shape, labels) = get_task(kind), CASES[kind]
    torch.manual_seed(1)
    logits = torch.randn(shape)
    padded = torch.cat([logits, logits[:1]]).requires_grad_()
    alone = logits.clone().requires_grad_()
    with ReadsBack() as seen:
        loss = task.sum_loss(padded, torch.cat([labels, torch.full_like(labels[:1], IGNORED_LABEL)]), smoothing)
        loss.backward()
    assert not seen.found
    task.sum_loss(alone, labels, smoothing).backward()
    assert loss.item() == pytest.approx(task.sum_loss(logits, labels, smoothing).item(), rel=1e-6)
    assert padded.grad is not None and alone.grad is not None
    assert not padded.grad[-1].any() and torch.allclose(padded.grad[:-1], alone.grad)
