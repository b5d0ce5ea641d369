"""Labelled examples for a model that is shown a few: drawn by seed, the same number of every label."""

from __future__ import annotations

import numpy as np


def draw_shots(labels: np.ndarray, classes: int, shots: int, seed: int) -> list[np.ndarray]:
    """Return for each label the positions of at most `shots` train rows, int64, drawn without replacement."""
    rng = np.random.default_rng([seed, shots])
    return [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in range(classes)]
