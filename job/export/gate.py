"""The gates: what may be released. Pure functions of logits and labels; fail closed.

Parity: torch and ONNX fp32 must be the same model. Quality: int8 may lose a little, and the loss
must be bounded, not just observed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from job.errors import GateFailed
from job.recipe.schema import Int8
from job.tasks import TextClassification, bound_mean, estimate_margin

_SHOWN_ROWS = 5
MAX_ABS_LOGIT_DIFF = 1e-3
"""fp32 against fp32: kernels add up in another order, which moves a logit by about 1e-5."""


def check_parity(expected: np.ndarray, found: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """Compare logits float32 [rows, labels] of torch and ONNX; raise GateFailed (15) naming the worst row.

    `rows` are the source's row numbers. A label may differ only where torch's two best logits are
    closer than the tolerance.
    """
    if expected.shape != found.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise GateFailed(
            f"export: torch answers {expected.shape}, ONNX {found.shape}, or one of them NaN; nothing is released, "
            "the checkpoint is kept"
        )
    difference = np.abs(expected - found).max(axis=1)
    same = expected.argmax(axis=1) == found.argmax(axis=1)
    best = np.sort(expected, axis=1)
    undecided = best[:, -1] - best[:, -2] <= 2 * MAX_ABS_LOGIT_DIFF
    worst = int(difference.argmax())
    if difference[worst] > MAX_ABS_LOGIT_DIFF or not (same | undecided).all():
        raise GateFailed(
            f"export: ONNX fp32 differs from torch by {difference[worst]:.3g} on test row {rows[worst]} "
            f"(at most {MAX_ABS_LOGIT_DIFF:g}); nothing is released, the checkpoint is kept"
        )
    return {
        "max_abs_logit_diff": float(f"{difference[worst]:.3g}"),
        "agreement": round(float(same.mean()), 6),
        "n": len(expected),
        "worst": [
            {"row": int(rows[place]), "difference": float(f"{difference[place]:.3g}")}
            for place in np.argsort(-difference, kind="stable")[:_SHOWN_ROWS]
        ],
    }


def compare_quality(task: TextClassification, fp32: np.ndarray, int8: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return metric, drop, its one-sided 95 % bound, and label agreement of int8 against fp32.

    Arrays are float32 [rows, labels] and int64 [rows]. The bound is that of a paired mean: rows
    that both models judge alike cancel out (drop > 0: int8 is worse; 0.01 is one point).
    """
    paired = task.per_row_score(fp32, labels) - task.per_row_score(int8, labels)
    drop, margin = bound_mean(paired)
    if not np.isfinite(int8).all():  # whatever its label is, nobody can use such an answer
        return {"metric": 0.0, "drop": 1.0, "margin": 0.0, "drop_bound": 1.0, "agreement": 0.0, "n": len(paired)}
    return {
        "metric": round(float(task.per_row_score(int8, labels).mean()), 6),
        "drop": round(drop, 6),
        "margin": round(estimate_margin(paired), 6),
        "drop_bound": round(drop + margin, 6),
        "agreement": round(float((fp32.argmax(axis=1) == int8.argmax(axis=1)).mean()), 6),
        "n": len(paired),
    }


def describe_quality(quality: dict[str, Any]) -> str:
    """Say a comparison in words."""
    return (
        f"drop {quality['drop']:+.4f}, bound {quality['drop_bound']:+.4f}, "
        f"agreement {quality['agreement']:.4f} on {quality['n']} rows"
    )


def looks_good(quality: dict[str, Any], gate: Int8) -> bool:
    """Tell whether a comparison on validation rows promises to pass: few of them can choose a rung, if not prove it."""
    within = quality["drop"] + quality["margin"] <= gate.max_metric_drop
    return bool(within and quality["agreement"] >= gate.min_agreement)


def passes(quality: dict[str, Any], gate: Int8) -> bool:
    """Tell whether a comparison meets the recipe's limits on enough rows."""
    return bool(
        quality["n"] >= gate.min_rows
        and quality["drop_bound"] <= gate.max_metric_drop
        and quality["agreement"] >= gate.min_agreement
    )
