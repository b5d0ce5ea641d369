"""The gates: what may be released. Pure functions of answers and labels; fail closed.

Parity: torch and ONNX fp32 must be the same model. Quality: int8 may lose a little, and the loss
must be bounded, not just observed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from job.errors import GateFailed
from job.recipe.schema import Int8
from job.tasks import Task, Truth, bound_mean, estimate_margin

_SHOWN_ROWS, _SHORTEST = 5, 16


def check_parity(task: Task, expected: np.ndarray, found: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """Compare answers float32 [units, k] of torch and ONNX; raise GateFailed (15) naming the worst row.

    `rows` are the source's row numbers, one for each unit. What is said may differ only where it is ahead of the next
    by less than the task's tolerance.
    """
    if expected.shape != found.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise GateFailed(
            f"export: torch answers {expected.shape}, ONNX {found.shape}, or one of them NaN; nothing is released, "
            "the checkpoint is kept"
        )
    difference = np.abs(task.logits_of(expected) - task.logits_of(found)).max(axis=1)
    same = task.agree(expected, found)
    undecided = task.lead(expected) <= 2 * task.max_abs_diff
    worst = int(difference.argmax())
    if difference[worst] > task.max_abs_diff or not (same | undecided).all():
        raise GateFailed(
            f"export: ONNX fp32 differs from torch by {difference[worst]:.3g} on test row {rows[worst]} "
            f"(at most {task.max_abs_diff:g}); nothing is released, the checkpoint is kept"
        )
    return {
        "max_abs_logit_diff": float(f"{difference[worst]:.3g}"),
        "agreement": round(float(same.mean()), 6),
        "n": len(np.unique(rows)),
        "worst": [
            {"row": int(rows[place]), "difference": float(f"{difference[place]:.3g}")}
            for place in np.argsort(-difference, kind="stable")[:_SHOWN_ROWS]
        ],
    }


def list_by_length(task: Task, expected: np.ndarray, found: np.ndarray, lengths: np.ndarray) -> list[dict[str, Any]]:
    """Return {tokens, n, max_abs_logit_diff, agreement} for rows of at most `tokens` tokens, bucket by bucket.

    Answers are float32 [units, k], `lengths` int64 [units]: of each unit's row. Buckets without a row are left out.
    """
    difference = np.abs(task.logits_of(expected) - task.logits_of(found)).max(axis=1)
    same = task.agree(expected, found)
    bucket = np.maximum(2 ** np.ceil(np.log2(np.maximum(lengths, 1))), _SHORTEST).astype(np.int64)
    return [
        {
            "tokens": int(tokens),
            "n": int((bucket == tokens).sum()),
            "max_abs_logit_diff": float(f"{difference[bucket == tokens].max():.3g}"),
            "agreement": round(float(same[bucket == tokens].mean()), 6),
        }
        for tokens in np.unique(bucket)
    ]


def compare_quality(task: Task, fp32: np.ndarray, int8: np.ndarray, truth: Truth) -> dict[str, Any]:
    """Return metric, drop, its one-sided 95 % bound, and agreement of int8 against fp32.

    Answers are float32 [units, k]. The bound is that of a paired mean: rows that both models judge alike cancel out
    (drop > 0: int8 is worse; 0.01 is one point). Agreement counts units: labels of rows, or tokens.
    """
    rows = len(np.unique(truth.rows))
    if not np.isfinite(task.logits_of(int8)).all():  # whatever it says, nobody can use such an answer
        return {"metric": 0.0, "drop": 1.0, "margin": 0.0, "drop_bound": 1.0, "agreement": 0.0, "n": rows}
    before, after = (task.per_row_counts(answers, truth) for answers in (fp32, int8))
    scores = task.weigh_counts(after)
    paired = task.weigh_counts(before) - scores
    drop, margin = bound_mean(paired, before != after)
    return {
        "metric": round(float(scores.mean()), 6),
        "drop": round(drop, 6),
        "margin": round(estimate_margin(paired), 6),
        "drop_bound": round(drop + margin, 6),
        "agreement": round(float(task.agree(fp32, int8).mean()), 6),
        "n": len(paired),
    }


def describe_quality(quality: dict[str, Any]) -> str:
    """Say a comparison in words."""
    decoding = quality.get("decoding")
    return (
        f"drop {quality['drop']:+.4f}, bound {quality['drop_bound']:+.4f}, "
        f"agreement {quality['agreement']:.4f} on {quality['n']} rows"
    ) + (f", {decoding['agreement']:.4f} with itself token by token" if decoding else "")


def looks_good(quality: dict[str, Any], gate: Int8, margins: int = 1) -> bool:
    """Tell whether a comparison on validation rows promises to pass: few of them can choose a rung, if not prove it.

    `margins`: how many of the drop's margins must lie below the limit. With one, a rung that is just within it passes
    on as many test rows one time of two or three; with two, most times.
    """
    within = quality["drop"] + margins * quality["margin"] <= gate.max_metric_drop
    return bool(within and quality["agreement"] >= gate.min_agreement and decodes_alike(quality, gate))


def decodes_alike(quality: dict[str, Any], gate: Int8) -> bool:
    """Tell whether a decoder answers token by token as it does at once; other models have nothing to answer so.

    Few rows prove no equality: what differs by no more than they may by chance is alike.
    """
    decoding = quality.get("decoding", {"drop": 0.0, "margin": 0.0, "agreement": 1.0})
    differs = abs(decoding["drop"]) - decoding["margin"]
    return bool(differs <= gate.max_metric_drop and decoding["agreement"] >= gate.min_agreement)


def passes(quality: dict[str, Any], gate: Int8, min_rows: int) -> bool:
    """Tell whether a comparison meets the recipe's limits on enough rows."""
    return not list_faults(quality, gate, min_rows)


def list_faults(quality: dict[str, Any], gate: Int8, min_rows: int) -> list[str]:
    """Return which of the recipe's limits a comparison does not meet, in words; what is no number meets none."""
    met = {
        f"only {quality['n']} of the {min_rows} rows that a proof needs": quality["n"] >= min_rows,
        f"bound above {gate.max_metric_drop:g} (max_metric_drop)": quality["drop_bound"] <= gate.max_metric_drop,
        f"agreement below {gate.min_agreement:g} (min_agreement)": quality["agreement"] >= gate.min_agreement,
        "answers otherwise token by token": decodes_alike(quality, gate),
    }
    return [fault for fault, is_met in met.items() if not is_met]
