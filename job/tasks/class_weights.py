"""What each label counts in the loss, so that rare ones are learned as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from job.tasks.protocol import IGNORED_LABEL


def weigh_labels(asked: str | Mapping[str, float], names: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Return the weight of each label, float32 [names]: what `asked` says of it, else 1.

    `balanced`: n / (k · n_c), as scikit-learn's, of n labels of k kinds; of sets of labels the rows without a label
    over those with it (`pos_weight`). `labels`: those of the train rows as in a token table, int [any] or, of sets,
    float [rows, names]. One that no row has, or every one, weighs 1.
    """
    if not isinstance(asked, str):
        return np.array([asked.get(name, 1.0) for name in names], dtype=np.float32)
    if labels.ndim == 2:
        there = (labels == 1).sum(axis=0)
        ratio, usable = (len(labels) - there) / np.maximum(there, 1), (there > 0) & (there < len(labels))
    else:
        there = np.bincount(labels[labels != IGNORED_LABEL].astype(np.int64), minlength=len(names))
        ratio, usable = there.sum() / (np.count_nonzero(there) * np.maximum(there, 1)), there > 0
    return np.where(usable, ratio, 1.0).astype(np.float32)
