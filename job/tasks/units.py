"""What numbers are counted in while a model is trained: standard deviations from the mean of the train labels.

A new head answers about 0, and an optimizer's step has one size; in units of their own, labels of 1990 or of 0.001
would be out of reach, and bf16 would round them off. What is released answers in the data's units again, for its
head is linear: nobody who opens it needs to know of this.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from job.tasks.protocol import IGNORED_LABEL

if TYPE_CHECKING:
    import torch

log = logging.getLogger("job.tasks")


class Units(NamedTuple):
    """A label y is counted as (y − mean) / deviation."""

    mean: float
    deviation: float

    @staticmethod
    def measure(labels: np.ndarray, head: torch.nn.Linear | None) -> Units:
        """Return those of train labels float [rows] that `head` can take back; without one they stay as they are.

        A head without a bias cannot move the mean, so nothing is subtracted.
        """
        numbers = np.asarray(labels, dtype=np.float64)
        if head is None:
            return Units(0.0, 1.0)
        if head.bias is None:
            return Units(0.0, float(np.sqrt(np.square(numbers).mean())))
        return Units(float(numbers.mean()), float(numbers.std()))

    def standardize(self, labels: np.ndarray) -> np.ndarray:
        """Return labels float32 [rows] in these units."""
        numbers = (np.asarray(labels, dtype=np.float64) - self.mean) / self.deviation
        return avoid_filler(numbers.astype(np.float32))

    def enter(self, head: torch.nn.Linear | None) -> None:
        """Let a head that answers in the data's units answer in these."""
        _rescale(head, 1 / self.deviation, -self.mean / self.deviation)

    def leave(self, head: torch.nn.Linear | None) -> None:
        """Let a head that answers in these units answer in the data's."""
        _rescale(head, self.deviation, self.mean)


def find_head(model: Any) -> tuple[str, torch.nn.Linear | None]:
    """Return the layer that gives a model's one logit, and its name; "", None where there is none, or no linear one."""
    import torch

    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == 1
    ]
    if not found:
        log.warning("%s: no linear layer gives its answer; labels are learned in their own units", type(model).__name__)
    return found[-1] if found else ("", None)


def avoid_filler(labels: Any) -> Any:
    """Return float32 labels with the next larger number where one is exactly what marks a row as a filler."""
    return np.where(labels == IGNORED_LABEL, np.nextafter(np.float32(IGNORED_LABEL), np.float32(0)), labels)


def _rescale(head: torch.nn.Linear | None, scale: float, shift: float) -> None:
    import torch

    if head is None:
        return
    with torch.no_grad():
        head.weight.mul_(scale)
        if head.bias is not None:
            head.bias.mul_(scale).add_(shift)
